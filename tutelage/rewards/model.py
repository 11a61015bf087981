"""The score of a reward model, which a stage has loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tutelage.config import rewards as config
from tutelage.errors import RewardError
from tutelage.records import Rollout
from tutelage.rewards import TermScore

ScoreTexts = Callable[[list[list[int]]], Sequence[float]]  # ids of prompt and answer -> a score each


class RewardModel:
    """The very ids are scored that the model was given and made, never text that is tokenized again."""

    def __init__(self, settings: config.RewardModel, *, score_texts: ScoreTexts) -> None:
        self.settings, self._score = settings, score_texts

    def __call__(self, rollouts: Sequence[Rollout]) -> list[TermScore]:
        scores = self._score([[*r.prompt_ids, *r.ids] for r in rollouts])
        if len(scores) != len(rollouts):
            raise RewardError(f"the reward model gave {len(scores)} scores for {len(rollouts)} texts")
        return [TermScore((float(score) - self.settings.centre) / self.settings.scale) for score in scores]

    def close(self) -> None: ...
