"""Decoding with fixed shapes: the answers of decoding with those of the moment. Capturing needs a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.engine import small
from tests.models.shapes import CASES
from tutelage.engine import Engine, Sampling
from tutelage.engine.graphs import GraphRunner
from tutelage.engine.runner import CachedRunner
from tutelage.models import kernels
from tutelage.models.config import DecoderConfig
from tutelage.models.init import build

GREEDY = Sampling(12, temperature=0, logprobs=0)
FAMILIES = ["qwen3", "gemma2", "gemma3", "gpt2", "mistral", "olmo2", "llama-llama3"]


def texts() -> list[list[int]]:
    g = torch.Generator().manual_seed(2)
    return [torch.randint(3, 90, (n,), generator=g).tolist() for n in (3, 9, 21, 4, 30)]


def engines(model: Any, **how: Any) -> tuple[Engine, Engine]:
    """With fixed shapes, and without; both operation by operation."""
    with kernels.disabled():
        fixed, plain = Engine(model, slots=4, **how), Engine(model, slots=4, **how)
    assert type(plain.runner) is CachedRunner and fixed.cache is not None
    fixed.runner = GraphRunner(model, fixed.cache, capture=False)
    return fixed, plain


@pytest.mark.parametrize("case", FAMILIES)
def test_fixed_shapes_change_nothing(case: str) -> None:
    """A row too many that writes to somebody's slot; places beyond a text that are seen; a window or a position lost."""
    with kernels.disabled():
        fixed, plain = engines(build(DecoderConfig.from_hf(CASES[case]), 1).eval(), max_length=60)
        want, got = plain.generate(texts(), GREEDY), fixed.generate(texts(), GREEDY)
    for a, b in zip(want, got, strict=True):
        assert a.ids == b.ids
        assert [s.logprob for s in a.scores] == pytest.approx([s.logprob for s in b.scores], abs=1e-4)


def test_moved_weights_are_seen() -> None:
    model = small.model(97)
    with kernels.disabled():
        fixed, plain = engines(model)
        before = fixed.generate(texts(), GREEDY)
        for parameter in model.parameters():
            parameter.data = parameter.data * 1.5
        for engine in (fixed, plain):
            engine.weights_changed()
        after, want = fixed.generate(texts(), GREEDY), plain.generate(texts(), GREEDY)
    assert [c.ids for c in after] == [c.ids for c in want] != [c.ids for c in before]


def test_shapes_are_few() -> None:
    """A graph for every number of rows would be captured for longer than it runs."""
    with kernels.disabled():
        fixed, _ = engines(small.model(97, 1024))
        fixed.generate([t * 10 for t in texts()], Sampling(40, temperature=0, ignore_eos=True))
    assert isinstance(fixed.runner, GraphRunner)
    assert set(fixed.runner._steps) <= {(rows, longest) for rows in (1, 2, 4) for longest in (256, 512)}


@pytest.mark.gpu
def test_captured_steps_equal_plain_ones() -> None:
    if not torch.cuda.is_available():
        pytest.skip("CUDA graphs: no GPU here")
    model = build(DecoderConfig.from_hf(CASES["qwen3"]), 1).eval().to("cuda")
    engine = Engine(model, slots=4, max_length=60)
    assert isinstance(engine.runner, GraphRunner) and engine.cache is not None
    got = engine.generate(texts(), GREEDY)
    for text, done in zip(texts(), got, strict=True):
        scores = engine.score([([*text, *done.ids], len(text))])[0]
        assert [s.logprob for s in done.scores] == pytest.approx(scores.tolist(), abs=1e-3)
