"""How likely the tokens of a request's prompts are: for `echo` with `logprobs`, and for `prompt_logprobs`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tutelage.engine import TokenScore
from tutelage.engine.protocol import EngineProtocol
from tutelage.engine.scoring import Scored
from tutelage.serve.engine_thread import EngineThread
from tutelage.tokenizer.detokenize import Vocabulary


@dataclass(slots=True, frozen=True)
class PromptScores:
    """One prompt of n tokens, all but the first of which are scored."""

    ids: list[int]
    scored: Scored

    def echoed(self, top: int) -> list[TokenScore | int]:
        """The first token bare, each other one with its log-probability and those of the `top` most likely tokens."""
        s = self.scored
        rows = zip(self.ids[1:], s.logprobs.tolist(), s.top_ids.tolist(), s.top_logprobs.tolist(), strict=True)
        return [self.ids[0], *(TokenScore(t, p, tuple(zip(a[:top], b[:top], strict=True))) for t, p, a, b in rows)]

    def listed(self, top: int, vocabulary: Vocabulary) -> list[dict[str, Any] | None]:
        """As vLLM has them: null, then for each token an object by token id: the token itself, then the `top` most likely."""

        def entry(token: int, logprob: float, rank: int) -> dict[str, Any]:
            name = vocabulary.raw(token).decode("utf-8", "replace")
            return {"logprob": max(logprob, -9999.0), "rank": rank, "decoded_token": name}

        out: list[dict[str, Any] | None] = [None]
        for place, score in enumerate(self.echoed(top)[1:]):
            assert isinstance(score, TokenScore)
            found = {str(score.id): entry(score.id, score.logprob, int(self.scored.ranks[place]))}
            for rank, (token, logprob) in enumerate(score.top, 1):
                found.setdefault(str(token), entry(token, logprob, rank))
            out.append(found)
        return out


async def score_prompts(thread: EngineThread, prompts: list[list[int]], top: int, adapter: Any = None) -> list[PromptScores]:
    """Raises what `Engine.score_top` does: `ConfigError` for an encoder-decoder."""

    def score(engine: EngineProtocol, group: list[list[int]], adapter: Any) -> list[Scored]:
        return engine.score_top([(ids, 1) for ids in group], top, adapter)

    scored = await thread.grouped(prompts, score, adapter=adapter)
    return [PromptScores(ids, one) for ids, one in zip(prompts, scored, strict=True)]
