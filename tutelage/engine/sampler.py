"""The next token from logits. What else is in the batch has no say: each row is handled alone, noise included.

Noise is Gumbel noise (`noise.py`) keyed by (seed, sample, token index), so that a rounding difference between two runs moves a
choice only where two tokens were all but tied.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tutelage.engine.noise import draw
from tutelage.engine.sequence import Sampling, Sequence, TokenScore
from tutelage.errors import ArtifactError, ConfigError

_COLDEST, _HOTTEST = 1e-30, 1e30  # temperatures beyond are as good as these, and would be 0 and infinite in float32
_HALF = 2**63


def choose(logits: Tensor, sequences: list[Sequence], vocabulary: int | None) -> list[TokenScore]:
    """The next token of each sequence; logits [S,V] of its last token. Tokens from `vocabulary` on are never chosen.

    Raises `ArtifactError` when the model's logits are not numbers.
    """
    usable = logits if vocabulary is None or vocabulary >= logits.shape[-1] else logits[:, :vocabulary]
    if all(s.plain for s in sequences):
        return [TokenScore(t, 0.0) for t in _largest(usable)]
    scores = usable.float()
    if any(s.adjusts for s in sequences):
        scores = adjusted(scores, sequences)
    top = scores.amax(-1)
    _check(top)
    tokens = _largest(scores) if all(s.sampling.greedy for s in sequences) else _drawn(scores, top, sequences)
    return _with_logprobs(logits, tokens, sequences)


def likely(logits: Tensor, sequences: list[Sequence], ahead: int) -> list[int]:
    """What a sequence might choose `ahead` tokens after its next one, logits [S,V] being a guess at those of that place. Without
    bias, penalties and grammars: a guess may be wrong."""
    scores = logits.float()
    if any(not s.sampling.greedy for s in sequences):
        return _drawn(scores, scores.amax(-1), sequences, ahead)
    tokens: list[int] = scores.argmax(-1).tolist()
    return tokens


def _largest(scores: Tensor) -> list[int]:
    best, tokens = scores.max(-1)
    _check(best)
    out: list[int] = tokens.tolist()
    return out


def _check(best: Tensor) -> None:
    if not all(b - b == 0 for b in best.tolist()):  # inf and nan
        raise ArtifactError(
            "the model's output is not a number", fix="the weights are damaged or training diverged: take an earlier checkpoint"
        )


def adjusted(scores: Tensor, sequences: list[Sequence]) -> Tensor:
    """Logits with bias and penalties, and only what the model's rules, a grammar and the like allow. A penalty counts tokens of
    the answer; repetition counts the prompt too."""
    scores = scores.clone()
    size = scores.shape[-1]
    for row, sequence in zip(scores, sequences, strict=True):
        s = sequence.sampling
        if s.penalises:
            if s.repetition_penalty != 1:
                seen = torch.tensor(sorted({t for t in sequence.ids if t < size}), device=scores.device)
                z = row[seen]
                row[seen] = torch.where(z > 0, z / s.repetition_penalty, z * s.repetition_penalty)
            made = np.asarray([t for t in sequence.ids[sequence.prompt_length :] if t < size], dtype=np.int64)
            own, counts = np.unique(made, return_counts=True)
            if len(own):
                cost = s.presence_penalty + s.frequency_penalty * torch.from_numpy(counts).to(scores)
                row[torch.from_numpy(own).to(scores.device)] -= cost
        if s.logit_bias:
            known = {t: b for t, b in s.logit_bias.items() if 0 <= t < size}
            row[torch.tensor(list(known), dtype=torch.int64, device=scores.device)] += torch.tensor(list(known.values())).to(
                scores
            )
        if banned := [t for t in _banned(sequence) if t < size]:
            row[torch.tensor(banned, device=scores.device)] = -torch.inf
        if sequence.rules is not None and sequence.rules.last is not None and sequence.made == sequence.limit - 1:
            row.fill_(-torch.inf)[sequence.rules.last] = 0.0
        if sequence.constraint is not None:
            try:
                sequence.constraint.apply(row)
            except ConfigError:
                sequence.give_up()
    return scores


def _banned(sequence: Sequence) -> set[int]:
    """Tokens that must not come next."""
    out = set(sequence.ends) if sequence.made < sequence.sampling.min_tokens else set()
    if sequence.rules is not None:
        out.update(sequence.rules.never)
    if size := sequence.sampling.no_repeat_ngram:
        ids = sequence.ids
        ending = ids[len(ids) - size + 1 :]
        out.update(ids[i + size - 1] for i in range(len(ids) - size + 1) if ids[i : i + size - 1] == ending)
    return out


def _drawn(scores: Tensor, top: Tensor, sequences: list[Sequence], ahead: int = 0) -> list[int]:
    """A sample of each row: of the softmax of what filters leave of scores / temperature. Greedy rows take their largest, which
    top [S] is."""
    wanted = [s.sampling for s in sequences]
    temperature = torch.tensor([s.temperature and min(max(s.temperature, _COLDEST), _HOTTEST) for s in wanted]).to(scores)
    if rows := [i for i, s in enumerate(wanted) if s.filters and not s.greedy]:
        at = torch.tensor(rows, device=scores.device)
        scaled = scores[at].sub_(top[at, None]).div_(temperature[at, None])
        kept = _filtered(scaled, [wanted[i] for i in rows])
        scores = kept if len(rows) == len(wanted) else scores.index_copy(0, at, kept)
        top, temperature = top.index_fill(0, at, 0.0), temperature.index_fill(0, at, 1.0)
    keys = [((s.key[0] + _HALF) % (2 * _HALF) - _HALF, s.key[1], s.made + ahead) for s in sequences]
    tokens: list[int] = draw(scores, top, temperature, torch.tensor(keys, device=scores.device)).tolist()
    return tokens


def _filtered(scores: Tensor, wanted: list[Sampling]) -> Tensor:
    """Scores [S,V] with -inf where top-k, then top-p, then min-p drop a token. Tokens tied with the last kept one stay."""
    size = scores.shape[-1]
    ks = [s.top_k if 0 < s.top_k < size else size for s in wanted]
    # A full sort is the dearest part of sampling: only top-p without top-k needs one.
    width = max(k if k < size else size if s.top_p < 1 else 1 for k, s in zip(ks, wanted, strict=True))
    ordered = scores.topk(width, dim=-1).values if width < size else scores.sort(-1, descending=True).values
    last = torch.tensor([min(k, ordered.shape[1]) - 1 if k < size else -1 for k in ks], device=scores.device)
    floor = ordered.gather(1, last.clamp(min=0)[:, None])
    floor = torch.where(last[:, None] < 0, -torch.inf, floor)
    if any(s.top_p < 1 for s in wanted):
        kept = ordered.masked_fill(ordered < floor, -torch.inf)
        share = kept.softmax(-1)
        before = share.cumsum(-1) - share
        limit = torch.tensor([s.top_p for s in wanted]).to(scores)[:, None]
        count = (before < limit).sum(-1, keepdim=True).clamp(min=1)
        floor = torch.where(limit < 1, torch.maximum(floor, kept.gather(1, count - 1)), floor)
    if any(s.min_p > 0 for s in wanted):
        ratio = torch.tensor([s.min_p for s in wanted]).to(scores)[:, None]
        floor = torch.maximum(floor, ordered[:, :1] + ratio.log())
    return scores.masked_fill(scores < floor, -torch.inf)


def _with_logprobs(logits: Tensor, tokens: list[int], sequences: list[Sequence]) -> list[TokenScore]:
    """The tokens with the model's own log-probabilities, for the rows that ask."""
    out = [TokenScore(t, 0.0) for t in tokens]
    rows = [i for i, s in enumerate(sequences) if s.sampling.logprobs is not None]
    if not rows:
        return out
    logprobs = logits[rows].float().log_softmax(-1)
    own = logprobs.gather(1, torch.tensor([tokens[i] for i in rows], device=logits.device)[:, None])[:, 0].tolist()
    counts = [sequences[i].sampling.logprobs or 0 for i in rows]
    best = logprobs.topk(max(min(max(counts), logits.shape[-1]), 1), dim=-1)
    for i, logprob, count, values, ids in zip(rows, own, counts, best.values.tolist(), best.indices.tolist(), strict=True):
        out[i] = TokenScore(tokens[i], logprob, tuple(zip(ids[:count], values[:count], strict=True)))
    return out
