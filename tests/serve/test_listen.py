"""What `tutelage serve` checks before it loads a model, and what it takes from the environment."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from tutelage.cli import commands
from tutelage.errors import ConfigError
from tutelage.serve import listen
from tutelage.serve.keys import KeyRing
from tutelage.serve.options import Options


def test_a_taken_port_is_refused_before_loading() -> None:
    """Guards against a second server on one port that loads its model first and then ends with a traceback."""
    with socket.create_server(("127.0.0.1", 0)) as first, pytest.raises(ConfigError) as caught:
        listen.check_port(Options(port=first.getsockname()[1]))
    assert caught.value.field == "port"


@pytest.mark.parametrize("name", ["", "a b", "a\nb", "-a", "x" * 129])
def test_names_that_no_request_can_use(name: str) -> None:
    """Guards against `--name` taking what `POST /admin/models` refuses."""
    with pytest.raises(ConfigError, match="not a name for a model"):
        commands._check_name(name, "name")


def test_the_environment_holds_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against an empty variable that opens the server to all, and a set one that is not read."""
    seen: list[Any] = []
    monkeypatch.setattr(commands, "_named_models", lambda *_: {"m": Path("m")})
    monkeypatch.setattr(listen, "serve", lambda folders, options, adapters: seen.append(options.api_keys))
    for value in ("a-long-enough-secret", ""):
        monkeypatch.setenv(commands.API_KEY, value)
        commands.serve(["m"], api_key=["from-the-command-line"])
    monkeypatch.delenv(commands.API_KEY)
    commands.serve(["m"])
    assert seen == [("from-the-command-line", "a-long-enough-secret"), ("from-the-command-line", ""), ()]
    with pytest.raises(ConfigError):
        KeyRing(seen[1])
