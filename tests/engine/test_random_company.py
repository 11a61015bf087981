"""Whatever runs beside it, is cached, guessed or cancelled: an answer is the one its prompt gets alone."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engine import small
from tutelage.engine import Completion, Engine, Sampling, Sequence
from tutelage.engine.runner import FusedRunner
from tutelage.structured.grammar import Grammar

LONG = int(os.environ.get("TUTELAGE_FUZZ_EXAMPLES", "0"))
BEGINNINGS = [list(range(40, 40 + n)) for n in (1, 9, 33, 60)]  # each begins the next
GRAMMARS = [
    Grammar("regex", "[a-c ]{2,9}"),
    Grammar.of_schema({"type": "integer"}),
    Grammar.of_choices(["the cat", "the dog sat"]),
]


@dataclass(frozen=True)
class Asked:
    prompt: tuple[int, ...]
    sampling: Sampling
    at: int  # the step before which it is submitted
    cancelled: int | None  # the step before which it is cancelled


penalties = st.sampled_from([0.0, 0.0, 0.7, -1.5])
samplings = st.builds(
    Sampling,
    max_tokens=st.integers(1, 14),
    temperature=st.sampled_from([0.0, 0.0, 0.7, 1.0, 3.0]),
    top_p=st.sampled_from([1.0, 0.8]),
    top_k=st.sampled_from([0, 0, 1, 20]),
    min_p=st.sampled_from([0.0, 0.05]),
    seed=st.integers(-(2**70), 2**70),
    n=st.integers(1, 3),
    stop=st.sampled_from([(), (), ("a",), ("the", " c")]),
    logprobs=st.sampled_from([None, 0, 3]),
    presence_penalty=penalties,
    frequency_penalty=penalties,
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
    ignore_eos=st.booleans(),
    logit_bias=st.sampled_from([{}, {}, {44: 5.0, 7: -100.0}]),
    grammar=st.one_of(st.none(), st.none(), st.sampled_from(GRAMMARS)),
)
prompts = st.builds(lambda a, b: (*a, *b), st.sampled_from(BEGINNINGS), st.lists(st.integers(0, 255), max_size=5))
company = st.lists(
    st.builds(Asked, prompts, samplings, st.integers(0, 12), st.one_of(st.none(), st.integers(0, 25))), min_size=1, max_size=7
)
ways = st.fixed_dictionaries(
    {
        "slots": st.integers(1, 5),
        "speculate": st.sampled_from([0, 3]),
        "prefix_cache": st.booleans(),
        "prefill_tokens": st.sampled_from([7, 2048]),
    }
)


def run(engine: Engine, asked: list[Asked]) -> list[list[Sequence]]:
    """Submits, cancels and steps until nothing is left."""
    found: list[list[Sequence]] = [[] for _ in asked]
    step = 0
    while step <= max(a.at for a in asked) or not engine.idle:
        for mine, one in zip(found, asked, strict=True):
            if one.at == step:
                mine += [engine.submit(one.prompt, one.sampling, index) for index in range(one.sampling.n)]
            if one.cancelled is not None and one.cancelled == step:
                for sequence in mine[::2]:
                    engine.cancel(sequence)
        engine.step()
        step += 1
        assert step < 500
    return found


def test_answers_do_not_depend_on_their_company(tmp_path: Path) -> None:
    """A slot copied a token short, a neighbour's noise or penalties, a guess taken too early, a place never given back."""
    renderer = small.renderer(tmp_path / "t")
    model = small.model(renderer.tokenizer.vocab_size)
    if not isinstance(Engine(model).runner, FusedRunner):
        pytest.skip("bitwise equality needs our kernels")
    compiler = functools.cache(Engine(model, renderer).codec.grammars or (lambda: None))

    def made(**how: Any) -> Engine:
        engine = Engine(model, renderer, batch_invariant=True, **how)
        engine.codec.grammars = compiler  # type: ignore[assignment]
        return engine

    @functools.cache
    def alone(prompt: tuple[int, ...], key: str) -> Completion:
        sampling, index = known[key]
        engine = made(slots=1, prefix_cache=False)
        (mine,) = run(engine, [Asked(prompt, sampling, 0, None)])
        return mine[index].completion()

    known: dict[str, tuple[Sampling, int]] = {}

    @settings(
        max_examples=LONG or 60, derandomize=not LONG, deadline=None, database=None, print_blob=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(company, ways)
    def check(asked: list[Asked], how: dict[str, Any]) -> None:
        engine = made(**how)
        for one, mine in zip(asked, run(engine, asked), strict=True):
            for sequence in mine:
                known[key := f"{one.sampling}{sequence.index}"] = one.sampling, sequence.index
                want, got = alone(one.prompt, key), sequence.completion()
                if got.finish_reason == "cancelled":
                    assert got.ids == want.ids[: len(got.ids)]
                else:
                    assert (got.ids, got.text, got.finish_reason) == (want.ids, want.text, want.finish_reason)
                    assert got.scores == want.scores
        slots = engine.scheduler.slots
        assert engine.idle and slots.used == 0 and sorted(slots._free) == list(range(slots.count))

    check()
