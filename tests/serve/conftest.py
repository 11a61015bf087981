"""A model folder to answer from, and an engine of its own that says what the answers must be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine import small
from tests.serve.running import Process
from tutelage.chat.render import Renderer
from tutelage.engine import Engine
from tutelage.models.open import load


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.saved(tmp_path_factory.mktemp("answers"), "model", 256)


@pytest.fixture(scope="module")
def engine(model: Path) -> Engine:
    return Engine(load(model), Renderer(model))


@pytest.fixture
def start() -> Iterator[Any]:
    """Starts servers in processes of their own, which end with the test."""
    made: list[Process] = []

    def started(*words: str, port: int = 0) -> Process:
        made.append(Process(*words, port=port))
        return made[-1]

    yield started
    for process in made:
        process.popen.kill()
        process.popen.wait()
