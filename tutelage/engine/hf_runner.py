"""Runs models of `transformers` with the caches that they keep themselves. Sequences of equal length are read together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tutelage.engine.runner import OneAdapter, RecomputingRunner, Work
from tutelage.engine.sequence import Sampling, Sequence
from tutelage.models.hf.causal import Wrapped
from tutelage.models.hf.state import State
from tutelage.tokenizer.detokenize import TextStream


class HfRunner(OneAdapter):
    """Each sequence is a row of a state. Those that have read equally many tokens and read equally many now share one: n
    answers to a prompt stay together from its first token to their ends. Nothing is padded but sources."""

    shares = False

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.device = model, device
        self.rows: dict[int, tuple[State, int]] = {}  # slot -> state and row of the sequence in it

    @classmethod
    def of(cls, model: Any, device: torch.device) -> HfRunner | None:
        """None for a model that has to read whole sequences again: another one than of `transformers`, one whose cache is of
        another kind (recurrent, hybrid), one whose rotary angles change with the length of the text."""
        if not isinstance(model, Wrapped) or _stretches(model.config.to_hf()):
            return None
        return cls(model, device) if _agrees(cls(model, device), RecomputingRunner(model, device)) else None

    def read(self, work: list[Work]) -> Tensor:
        together: dict[tuple[int, int], list[Work]] = {}
        for w in work:
            together.setdefault((w.sequence.cached, len(w.tokens)), []).append(w)
        parts: dict[int, Tensor] = {}
        for (_, count), same in together.items():
            ids = torch.tensor([w.tokens for w in same], device=self.device)
            hidden = self.model.extend(ids, self._state([w.sequence for w in same]))
            picked = torch.cat([row[count - w.wanted :] for row, w in zip(hidden, same, strict=True)])
            logits = self.model.lm_head.logits(picked).split([w.wanted for w in same])
            parts |= dict(zip(map(id, same), logits, strict=True))
        return torch.cat([parts[id(w)] for w in work])

    def _state(self, sequences: list[Sequence]) -> State:
        """The state whose rows are these sequences, with what all of them have read and no rejected guesses."""
        length = sequences[0].cached
        if length == 0:
            state = self.model.begin([s.source or [] for s in sequences])
        else:
            held = [self.rows[s.slot] for s in sequences]
            state = held[0][0]
            if len(held) == state.rows and all(of is state and row == i for i, (of, row) in enumerate(held)):
                state.crop(length)
            else:
                state = State.of_rows(held, length)
        self.rows |= {s.slot: (state, row) for row, s in enumerate(sequences)}
        return state  # type: ignore[no-any-return]

    def copy(self, source: int, target: int, count: int) -> None:
        raise AssertionError("never asked for where `shares` is False")

    def fork(self, source: int, target: int, count: int) -> None:
        self.rows[target] = self.rows[source]

    def release(self, slot: int) -> None:
        """Forgets the sequence of a slot. Its row goes when the others of its state read on, the state when it has no other."""
        self.rows.pop(slot, None)


def _stretches(config: object) -> bool:
    """Whether rotary angles change once the text has some length: keys of a shorter text are wrong for a longer one."""
    if not isinstance(config, Mapping):
        return False
    return config.get("rope_type", config.get("type")) == "longrope" or any(map(_stretches, config.values()))


@torch.inference_mode()
def _agrees(fast: HfRunner, slow: RecomputingRunner) -> bool:
    """Whether both give the same logits, tried on two texts: whole, then in another order after tokens were taken back."""
    config = fast.model.config
    special = {config.bos_token_id, config.pad_token_id, *config.eos_token_ids}
    ids = [t for t in range(config.vocab_size) if t not in special][:4]
    how: dict[str, Any] = {"seed": 0, "index": 0, "limit": 1, "ends": frozenset()}
    texts = ((ids, ids[:2]), (ids[::-1], ids[:3]))
    both = [Sequence(text, Sampling(), TextStream(None), source=source, **how) for text, source in texts]
    for slot, sequence in enumerate(both):
        sequence.slot = slot
    try:
        for cached, order in ((0, both), (2, both[::-1])):
            work = []
            for sequence in order:
                sequence.cached = cached
                work.append(Work(sequence, sequence.ids[cached:], wanted=2))
            got, expected = fast.logits(work), slow.logits(work)
            tolerance = torch.finfo(expected.dtype).eps ** 0.5 * float(expected.abs().max())
            if not torch.allclose(got, expected, rtol=0, atol=tolerance):
                return False
    except Exception:  # a model that cannot keep such a cache says so in a way of its own
        return False
    return True
