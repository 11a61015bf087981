"""A model folder to answer from, and an engine of its own that says what the answers must be."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine import small
from tutelage.data.render import Renderer
from tutelage.engine import Engine
from tutelage.models.load import load


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.saved(tmp_path_factory.mktemp("answers"), "model", 256)


@pytest.fixture(scope="module")
def engine(model: Path) -> Engine:
    return Engine(load(model), Renderer(model))
