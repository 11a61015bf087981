"""What an engine can be asked at all: tokens that its model knows, and no more of them than its context holds."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from tutelage.engine.sequence import Sampling
from tutelage.errors import DataError


class ContextOverflow(DataError):
    """A prompt, or a prompt with the answer asked for, is longer than the context. Nothing is ever cut."""


def check_tokens(ids: Seq[int], vocab_size: int) -> None:
    """Raises `DataError` for an empty prompt and for an unknown token."""
    if not ids:
        raise DataError("the prompt is empty", field="prompt", expected="at least one token")
    if min(ids) < 0 or max(ids) >= vocab_size:
        wrong = next(t for t in ids if not 0 <= t < vocab_size)
        raise DataError("no such token", field="prompt", found=wrong, expected=f"ids from 0 to {vocab_size - 1}")


def check_length(ids: Seq[int], context_length: int) -> None:
    """Raises `ContextOverflow` for a text longer than the context."""
    if len(ids) > context_length:
        raise ContextOverflow("longer than the context", found=f"{len(ids)} tokens", expected=f"at most {context_length}")


def check_start(ids: Seq[int], start: int) -> None:
    """Raises `DataError` where scoring would begin outside 1..len(ids): a first token has nothing to be conditioned on."""
    if not 1 <= start <= len(ids):
        raise DataError("nothing to condition on", field="start", found=start, expected=f"from 1 to {len(ids)}")


def answer_limit(prompt: Seq[int], sampling: Sampling, context_length: int) -> int:
    """Tokens that the answer may have. Raises `ContextOverflow` where the context has no room for those asked for."""
    room = context_length - len(prompt)
    limit = sampling.max_tokens if sampling.max_tokens is not None else room
    if room < max(limit, 1):
        raise ContextOverflow(
            "the prompt and the answer asked for are longer than the context", field="max_tokens",
            found=f"{len(prompt)} tokens of prompt and {max(limit, 1)} of answer", expected=f"at most {context_length} together",
            fix="shorten the prompt or ask for fewer tokens",
        )  # fmt: skip
    return limit
