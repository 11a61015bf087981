"""Stages as Python functions."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pipeline import write_sources
from tutelage import api
from tutelage.errors import ArtifactError, ConfigError
from tutelage.stages import STAGES


def test_every_stage_is_a_function() -> None:
    """A stage that the command line knows and Python does not."""
    assert all(callable(getattr(api, name)) and getattr(api, name).__doc__ == STAGES[name].help for name in STAGES)
    with pytest.raises(AttributeError, match="no stage 'finetune'"):
        _ = api.finetune
    with pytest.raises(ConfigError, match="unknown stage `dta`") as caught:
        api.stage("dta")
    assert caught.value.fix == "did you mean `data`?"


def test_calls_chain(tmp_path: Path) -> None:
    """Paths and runs that must be turned to text by hand; results that can't be asked for their numbers."""
    write_sources(tmp_path)
    runs = tmp_path / "runs"
    corpus = api.data(sources=[tmp_path / "texts"], validation_share=0.2, runs=runs)
    assert corpus.done and corpus.facts["stage"] == "data"
    for data in (corpus, corpus.path, str(corpus.path), "cli/data"):
        words = api.tokenizer(data=data, vocab_size=300, runs=runs)
        assert (words.path / "tokenizer" / "tokenizer.json").exists()
    assert len(list((runs / "cli").glob("tokenizer-*"))) == 1 == len(list((words.path / "logs").iterdir()))
    assert words.facts["parents"][0]["digest"] == corpus.facts["artifact"]["digest"]


def test_errors_are_exceptions(tmp_path: Path) -> None:
    """A library that prints and exits."""
    with pytest.raises(ConfigError, match="unknown key `vocab`"):
        api.tokenizer(data="x", vocab=3)
    with pytest.raises(ArtifactError, match="no records there"):
        api.tokenizer(data="x", runs=tmp_path / "runs")
    with pytest.raises(ConfigError, match=r"unknown key `optimizer\.learning_rate`"):
        api.pretrain(data="x", optimizer={"learning_rate": 1})
    assert not (tmp_path / "runs").exists()
