"""Whether a base has ever read the tokens that end a turn, before an adapter is trained on it."""

from __future__ import annotations

import math
from typing import Any

import torch

from tutelage import log
from tutelage.config.train import Loop
from tutelage.data.tokens.shards import Segments
from tutelage.errors import Setting
from tutelage.models.adapters.virtual_tokens import max_text_tokens
from tutelage.models.interface import Batch

SAMPLE = 8  # texts


def warn_untrained_tokens(config: Loop, model: Any, segments: Segments, stop_ids: tuple[int, ...]) -> None:
    """Says so where only an adapter is trained and the base finds the end of a turn less likely than a guess would: its tables
    have nothing for the template's control tokens, and low-rank changes of its layers make up for little of that."""
    adapter = config.adapter
    if adapter.kind == "none" or adapter.embeddings:
        return
    cost, guess = cost_of(model, segments, stop_ids), math.log(model.config.vocab_size)
    if cost > guess:
        kind = "" if adapter.kind in ("lora", "dora", "ia3") else f"{Setting('adapter.kind', 'lora')} and "
        log.say(
            f"the base has hardly read the token that ends a turn: it costs {cost:.1f} nats, a guess {guess:.1f}; "
            f"{kind}{Setting('adapter.embeddings', 'true')} trains the tables of tokens too",
            style="yellow",
        )


@torch.inference_mode()
def cost_of(model: Any, segments: Segments, stop_ids: tuple[int, ...]) -> float:
    """Nats that the supervised tokens which end a turn cost, on average; 0 where there are none."""
    costs: list[float] = []
    device = next(model.parameters()).device
    most = min(max_text_tokens(model), 512)
    for i in range(min(SAMPLE, len(segments))):
        ids, mask = segments.ids(i)[:most], segments.mask(i)[:most]
        at = [t for t in range(1, len(ids)) if mask[t] and int(ids[t]) in stop_ids]
        if at:
            logprobs = model.logits(Batch.of([ids.tolist()], device=device))[0].float().log_softmax(-1)
            costs += [-float(logprobs[t - 1, int(ids[t])]) for t in at]
    return sum(costs) / len(costs) if costs else 0.0
