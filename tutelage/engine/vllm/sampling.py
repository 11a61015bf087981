"""Our `Sampling` as vLLM's `SamplingParams`, whole or not at all.

Two things act in vLLM's own order: a bias comes before the repetition penalty, and min-p before top-k and top-p.
"""

from __future__ import annotations

import hashlib
from typing import Any

from tutelage.engine.sequence import Sampling, Sequence
from tutelage.errors import ConfigError
from tutelage.structured.grammar import written

COLDEST, HOTTEST = 0.01, 2.0  # vLLM raises colder temperatures to the first, and refuses hotter ones


def check(sampling: Sampling) -> None:
    """Raises `ConfigError` naming the field that vLLM would not honour."""
    if sampling.temperature and not COLDEST <= sampling.temperature <= HOTTEST:
        raise ConfigError(
            "vLLM does not sample at this temperature", field="temperature", found=sampling.temperature,
            expected=f"0, or from {COLDEST} to {HOTTEST:g}",
        )  # fmt: skip
    if sampling.beams > 1:
        raise ConfigError("vLLM searches no beams here", field="beams", found=sampling.beams, expected="1")
    if sampling.no_repeat_ngram:
        raise ConfigError("vLLM does not forbid n-grams", field="no_repeat_ngram", found=sampling.no_repeat_ngram, expected="0")
    if sampling.grammar is not None and sampling.logprobs is not None:
        raise ConfigError(
            "of structured output, vLLM gives log-probabilities among the tokens that the grammar allows, not the model's own",
            field="logprobs", fix="ask for one of the two",
        )  # fmt: skip


def answering(sequence: Sequence, vocab_size: int, known: int) -> Any:
    """`SamplingParams` of one answer. vocab_size: width of the logits, of which the tokenizer knows the first `known`.

    Texts are ours: vLLM is told of tokens that end an answer, not of stop texts, and gives back tokens.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    wanted = sequence.sampling
    bias = {t: float(b) for t, b in wanted.logit_bias.items() if 0 <= t < vocab_size}
    bias |= dict.fromkeys(range(known, vocab_size), -100.0)  # padding of the vocabulary
    return SamplingParams(
        max_tokens=sequence.limit, min_tokens=min(wanted.min_tokens, sequence.limit), temperature=wanted.temperature,
        top_p=wanted.top_p, top_k=wanted.top_k, min_p=wanted.min_p,
        seed=None if wanted.seed is None else seed_of(*sequence.key), presence_penalty=wanted.presence_penalty,
        frequency_penalty=wanted.frequency_penalty, repetition_penalty=wanted.repetition_penalty, logit_bias=bias or None,
        stop_token_ids=sorted(t for t in sequence.ends if 0 <= t < vocab_size), ignore_eos=True, logprobs=wanted.logprobs,
        structured_outputs=_structured(wanted), detokenize=False, output_kind=RequestOutputKind.DELTA,
    )  # fmt: skip


def scoring(last: int, top: int) -> Any:
    """`SamplingParams` that score a prompt, and behind it the one token `last`: so that a text may fill the whole context."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=1, temperature=0.0, allowed_token_ids=[last], logprobs=top, prompt_logprobs=top, ignore_eos=True,
        detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY,
    )  # fmt: skip


def seed_of(seed: int, index: int) -> int:
    """A seed for answer `index` of those with one seed: 63 bits, which is what torch's generators take."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest(), "little") >> 1


def _structured(sampling: Sampling) -> Any:
    if sampling.grammar is None:
        return None
    from vllm.sampling_params import StructuredOutputsParams

    form, text = written(sampling.grammar)
    return StructuredOutputsParams(**{{"lark": "grammar"}.get(form, form): text})
