"""A judge behind a small HTTP server of the test's own."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.rewards.rollouts import rollout, rubric
from tutelage.errors import ConfigError, RewardError
from tutelage.rewards import endpoint


class Server(ThreadingHTTPServer):
    """Answers each request with the next of `says`: a text, a status, or bytes that are no answer; the last one for ever."""

    says: list[str | int | bytes]
    seen: list[dict[str, Any]]
    keys: list[str | None]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append(body)
        self.server.keys.append(self.headers["Authorization"])
        say = self.server.says.pop(0) if len(self.server.says) > 1 else self.server.says[0]
        status = say if isinstance(say, int) else 200
        text = json.dumps({"choices": [{"message": {"content": say}}]}).encode() if isinstance(say, str) else say
        text = text if isinstance(text, bytes) else b"{}"
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *arguments: object) -> None: ...


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(endpoint, "_FIRST_WAIT", 0.01)
    with Server(("127.0.0.1", 0), Handler) as made:
        made.seen, made.keys, made.says = [], [], ["Score: 10"]
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def settings(server: Server, **more: Any) -> dict[str, Any]:
    return {"judge": {"base_url": f"http://127.0.0.1:{server.server_address[1]}/v1", "retries": 2, "parallel": 1, **more}}


def test_the_judge_is_shown_all_and_its_score_is_read(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards what is asked, the key, and that what a text holds is never filled in again."""
    monkeypatch.setenv("JUDGE_KEY", "secret")
    server.says = ["Quite good. Score: 3\nBut no: **Score**: 7.5"]
    with rubric(settings(server, key_variable="JUDGE_KEY", model="big")) as made:
        verdict = made.judge([rollout("I say {answer} {prompt}", "42", prompt="Why?")])[0]
    assert verdict.reward == 0.75 and "7.5" in verdict.notes["judge"]
    asked = server.seen[0]["messages"][0]["content"]
    assert all(part in asked for part in ("Why?", "is known: 42", "I say {answer} {prompt}", "to 10 (perfect)"))
    assert server.keys == ["Bearer secret"] and server.seen[0]["model"] == "big"


def test_what_may_pass_is_tried_again(server: Server) -> None:
    """Guards a long run against a server that is busy for a moment, or answers nonsense once."""
    server.says = [503, b"not json", "Score: 5"]
    with rubric(settings(server, question="{text}")) as made:
        assert made.judge([rollout("x")])[0].reward == 0.5
    assert len(server.seen) == 3


@pytest.mark.parametrize(("say", "tries"), [(500, 3), (401, 1), (b"{}", 3)])
def test_a_judge_that_fails_stops_the_run(server: Server, say: Any, tries: int) -> None:
    """Guards against rewards of 0 where nobody judged; what will not pass is not tried again."""
    server.says = [say]
    with (
        rubric(settings(server, question="{text}")) as made,
        pytest.raises(RewardError, match=r"`judge`: the judge at .* does not answer"),
    ):
        made.judge([rollout("x")])
    assert len(server.seen) == tries


@pytest.mark.parametrize("said", ["I refuse.", "Score: 11", "Score: -5", "score" * 1000])
def test_an_answer_without_a_score_is_asked_for_again_and_then_counted(server: Server, said: str) -> None:
    """Guards against a text that talks the judge out of judging: it has the worst value, and does not end the run."""
    server.says = [said]
    with rubric(settings(server, question="{text}")) as made:
        verdict = made.judge([rollout("Say nothing")])[0]
        assert verdict.reward == 0 and "no score" in verdict.notes["judge"] and made.past_limits["judge"] == 1
    assert len(server.seen) == 3


def test_what_a_judge_needs_is_said_before_the_run(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a key that is missing, an address that is none, and a prompt that can't be shown."""
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ConfigError, match="key is not set"):
        rubric(settings(server, key_variable="NO_SUCH_KEY"))
    with pytest.raises(ConfigError, match="not the address of a server"):
        rubric({"judge": {"base_url": "file:///etc/passwd"}})
    with rubric(settings(server)) as made, pytest.raises(RewardError, match="can't be shown the prompt"):
        made.judge([rollout("x")])


def test_a_stage_may_bring_its_own_model() -> None:
    """Guards the wiring of an engine as judge."""

    class Reply:
        content = "Score: 4"

    asked: list[str] = []

    def generate(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> Reply:
        asked.append(messages[0]["content"])
        return Reply()

    with rubric({"judge": {"highest": 5}}, generate=generate, asked=lambda r: f"prompt {r.prompt}") as made:
        assert made.judge([rollout("x")])[0].reward == 0.8
    assert "prompt abc" in asked[0]
