"""Greedy answers equal `generate` of `transformers` for every family and kind of model, in one batch of prompts of other lengths.

Compared up to the first place where the two best logits are closer than NEAR: rounding may choose there. Such places are counted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine import test_hf_runner, test_seq2seq
from tests.models import shapes, test_hf
from tutelage.engine import Engine, Sampling
from tutelage.engine.hf_runner import HfRunner
from tutelage.engine.runner import CachedRunner, FusedRunner, RecomputingRunner
from tutelage.models import families, kernels
from tutelage.models.hf.causal import Adapter
from tutelage.models.open import load

TOKENS, NEAR = 26, 2e-4
GREEDY = Sampling(TOKENS, temperature=0)
SHAPE: dict[str, Any] = {
    "vocab_size": 97, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "forced_eos_token_id": None,
}  # fmt: skip
KINDS = {**test_hf.OTHERS, **test_hf_runner.CACHED, **test_hf_runner.NOT_CACHED}
SEQ2SEQ = {
    **{k: v for k, v in test_seq2seq.CASES.items() if k != "bart-forced-bos"},
    "marian": {"model_type": "marian", **SHAPE, "pad_token_id": 96, "decoder_start_token_id": 96, "eos_token_id": 0},
    "pegasus": {"model_type": "pegasus", **SHAPE, "decoder_start_token_id": 0},
    "mbart": {"model_type": "mbart", **SHAPE, "decoder_start_token_id": 5, "forced_bos_token_id": 9},
}  # fmt: skip


def prompts() -> list[list[int]]:
    g = torch.Generator().manual_seed(5)
    return [torch.randint(3, 97, (n,), generator=g).tolist() for n in (3, 30, 16, 9)]


def answers(theirs: Any, skip: int | None = None) -> list[tuple[list[int], int]]:
    """For each prompt what `generate` says, and how many of its tokens come before a place where the best two are near."""
    out = []
    for prompt in prompts():
        ids = torch.tensor([prompt])
        got = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=1, eos_token_id=None, pad_token_id=0,
            max_new_tokens=TOKENS + (skip or 1) - 1, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        best = torch.stack(got.logits)[:, 0].topk(2).values[(skip or 1) - 1 :]
        near = (best[:, 0] - best[:, 1] < NEAR).tolist()
        out.append((got.sequences[0, skip or len(prompt) :].tolist(), near.index(True) if True in near else TOKENS))
    return out


def compare(engine: Engine, want: list[tuple[list[int], int]], name: str) -> None:
    done = engine.generate(prompts(), Sampling(TOKENS, temperature=0, ignore_eos=True))
    for answer, (ids, sure) in zip(done, want, strict=True):
        assert list(answer.ids[:sure]) == ids[:sure] and len(answer.ids) == len(ids) == TOKENS
    sure, near = sum(n for _, n in want), sum(n < TOKENS for _, n in want)
    print(f"{name}, {type(engine.runner).__name__}: {sure} tokens equal; {near} of {len(want)} answers cut short at a near tie")
    assert sure > 0.8 * TOKENS * len(want), "hardly anything was compared"


def wide(raw: dict[str, Any]) -> dict[str, Any]:
    """The same model with heads of 16, which our kernels take; rotary factors, one a pair of a head's numbers, twice."""
    if raw["model_type"] == "gpt2":
        return {**raw, "n_head": 2}
    rope = {k: v * 2 if isinstance(v, list) else v for k, v in raw.get("rope_parameters", {}).items()}
    return {**raw, "head_dim": 16, **({"num_attention_heads": 2} if raw["model_type"] in ("qwen2", "phi3") else {}),
            **({"rope_parameters": rope} if rope else {})}  # fmt: skip


NOT_FUSED = ("phi3-longrope", "phi3-longrope-short", "gpt2-by-layer")
"""What our kernels do not run as a whole."""


def test_every_family_is_here() -> None:
    """A family that is added without an answer that anybody compared."""
    assert {raw["model_type"] for raw in shapes.CASES.values()} == set(families.names())


@pytest.mark.parametrize("case", shapes.CASES)
def test_our_families(case: str, tmp_path: Path) -> None:
    """Our decoder at a prompt's end and token by token: through one call of our kernels, and operation by operation."""
    theirs, folder = shapes.written(wide(shapes.CASES[case]), tmp_path / "m")
    want, ours = answers(theirs), load(folder, adapter=False)
    fused = Engine(ours)
    assert isinstance(fused.runner, FusedRunner) == (not kernels.why_not() and case not in NOT_FUSED)
    compare(fused, want, case)
    with kernels.disabled():
        plain = Engine(ours)
        assert isinstance(plain.runner, RecomputingRunner if "longrope" in case else CachedRunner)
        compare(plain, want, case)


def test_angles_that_change_with_length(tmp_path: Path) -> None:
    """Keys turned by the angles of a short text beside a query with those of a long one, in answers and in scores; and a cache
    refused where no text is so long."""
    theirs, folder = shapes.written("phi3-longrope", tmp_path / "m")
    ours = load(folder, adapter=False)
    requests = [([*range(3, 19), *ending], 16) for ending in ([40, 41, 42], [50, 51])]  # 16 tokens in common stay steady
    short = [(ids[:10], 4) for ids, _ in requests] + [([*range(40, 53), 9, 9], 13)]
    for asked in (requests, [(ids[3:], 14) for ids, _ in requests], short, [*requests, *short]):
        for (ids, start), got in zip(asked, Engine(ours).score(asked), strict=True):
            rows = shapes.reference_logits(theirs, torch.tensor([ids[:-1]]))[0].log_softmax(-1)
            want = [float(rows[i - 1, ids[i]]) for i in range(start, len(ids))]
            assert got.tolist() == pytest.approx(want, abs=1e-4)
    assert isinstance(Engine(ours, max_length=16).runner, CachedRunner)


@pytest.mark.parametrize("case", ["llama", "qwen2-window", "gemma2", "gpt2"])
def test_heads_too_narrow_for_the_kernels(case: str, tmp_path: Path) -> None:
    """Attention with our kernels inside a model that they do not run as a whole."""
    theirs, folder = shapes.written(case, tmp_path / "m")
    engine = Engine(load(folder, adapter=False))
    assert isinstance(engine.runner, CachedRunner)
    compare(engine, answers(theirs), case)


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_transformers(kind: str) -> None:
    """The adapter, with the cache of the model's own or without."""
    theirs = shapes.reference(KINDS[kind])
    engine = Engine(Adapter(theirs), max_length=60)
    assert isinstance(engine.runner, RecomputingRunner if kind in test_hf_runner.NOT_CACHED else HfRunner)
    compare(engine, answers(theirs), kind)


@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_encoder_decoders(kind: str, tmp_path: Path) -> None:
    """Sources of any length beside each other, targets that begin as their model wants it."""
    theirs = test_seq2seq.reference(SEQ2SEQ[kind])
    theirs.save_pretrained(tmp_path)
    engine: Any = Engine(load(tmp_path), max_length=60)
    assert isinstance(engine.runner, HfRunner)
    compare(engine, answers(theirs, len(engine.model.start)), kind)
