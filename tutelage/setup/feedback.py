"""What stage `reward` learns from, by kind: preferences, ratings of whole answers, ratings of steps."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tutelage.config.stages import Reward
from tutelage.data.groups.groups import bins, collate
from tutelage.data.groups.pairs import PreferencePairs, margins
from tutelage.data.groups.ratings import RatedGroups, aspects_of, ratings_of, steps_of
from tutelage.data.tokens.shards import Segments
from tutelage.errors import ConfigError, DataError, Setting
from tutelage.evaluate import scorers
from tutelage.models.scorer import Scorer
from tutelage.objectives.answers import answers_of, own_places
from tutelage.objectives.reward import log_odds
from tutelage.rundir import RunDir
from tutelage.setup import answers
from tutelage.tokenizer.load import TokenizerFolder

Groups = PreferencePairs | RatedGroups


@dataclass(slots=True)
class RewardData:
    """The data of a run."""

    config: Reward
    method: str
    kind: str  # preferences | ratings
    unit: str  # of a prompt group
    outputs: tuple[str, ...]  # names of the scores
    records: Path
    tokens: Path
    words: TokenizerFolder

    def prompt_groups(self, split: str, length: int) -> Groups | None:
        """The prompt groups of a split, None of an empty one. Says what is left out."""
        segments = Segments.open(self.tokens / split, vocabulary=self.words.vocab_size)
        if split == "validation" and not len(segments):
            return None
        found = self._groups_of(segments, self.records / f"{split}.jsonl", length)
        if split == "train" and isinstance(found, RatedGroups) and not found.varies:
            raise DataError(
                "all ratings are the same: there is nothing to learn from them", file=self.records / f"{split}.jsonl",
                expected="ratings that differ", fix="give answers of every worth, the bad ones too",
            )  # fmt: skip
        if split == "train":
            first = int(found.kept[0]) * 2 if isinstance(found, PreferencePairs) else int(found.kept[0])
            answers.show_first(segments, self.words, self.records, first)
        answers.say_left_out(found.report, split, length, self.config.too_long)
        return found

    def _groups_of(self, segments: Segments, file: Path, length: int) -> Groups:
        rows = read_rows(file)
        too_long = self.config.too_long
        if self.method == "reward":
            pairs = PreferencePairs(segments, length, too_long)
            given = margins(rows)
            if given is not None:
                pairs.set_values("margin", given[pairs.kept])
            return pairs
        if self.method == "process":
            return RatedGroups(segments, length, too_long, steps=steps_of(rows, segments, self.words.decode, file))
        return RatedGroups(segments, length, too_long, ratings=ratings_of(rows, self.outputs))

    def measured(self, scorer: Scorer, held_out: Groups, layout: Any, device: torch.device) -> dict[str, Any]:
        """What `evaluate.scorers` says of the held-out part."""
        got, lengths, wanted = scored(scorer, held_out, self.method, layout, self.config.micro_tokens, device)
        if self.method == "reward":
            return scorers.of_pairs(got.reshape(-1, 2), lengths.reshape(-1, 2))
        rows = read_rows(self.records / "train.jsonl")
        if self.method == "process":
            verdicts = [score for row in rows for score in row.get("step_scores") or ()]
            return scorers.of_steps(got[:, 0], wanted, float(np.mean(verdicts)))
        means = np.nanmean(ratings_of(rows, self.outputs), 0).astype(np.float64)
        return scorers.of_ratings(got, wanted, lengths, self.outputs, means)

    def told(self, found: dict[str, Any]) -> list[str]:
        """The held-out result in lines for people."""
        if not found:
            return ["no held-out part: nothing says how well this model agrees with people"]
        if self.method == "reward":
            near = found["correlation_with_length"]
            return [
                f"held out: accuracy {_share(found['accuracy'])} of {found['pairs']:,} pairs; always choosing the longer answer: "
                f"{_share(found['longer_wins'])} (p = {found['beyond_length']:.2g} that length alone does as well)",
                f"rewards: {_spread(found['rewards'])}; margin {found['margin']['value']:.3g}"
                + ("" if near is None else f"; correlation with length {near:+.2f}"),
            ]
        if self.method == "process":
            return [f"held out: {_share(found['accuracy'])} of {found['steps']:,} steps judged right; always the same verdict: "
                    f"{_share(found['usual'])}"]  # fmt: skip
        return [
            f"held out: {name}: mean error {row['error']['value']:.3g} of {row['ratings']:,} ratings"
            + (f", {row['explained']['value']:.0%} of their variance explained" if "explained" in row else "")
            for name, row in found.items()
        ]


def load_reward_data(config: Reward, run: RunDir, kind: str, words: TokenizerFolder) -> RewardData:
    """The data of a run, tokenized. The method is the one that is asked for, or else the one that the data is for."""
    records = run.input("data")
    assert run.nested is not None
    tokens = run.nested("tokens", {"data": str(records), "tokenizer": str(run.input("model"))}).path / "tokens"
    if kind == "Preference":
        _refuse_aspects(config, config.method or "reward")
        return RewardData(config, config.method or "reward", "preferences", "pairs", ("reward",), records, tokens, words)
    rows = read_rows(records / "train.jsonl")
    method = config.method or ("process" if any(row.get("steps") for row in rows) else "rating")
    if method != "rating":
        _refuse_aspects(config, method)
        return RewardData(config, method, "ratings", "prompts", ("right",), records, tokens, words)
    known = aspects_of(rows)
    for name in config.aspects:
        if name not in known:
            raise ConfigError("no rating has this aspect", field="aspects", found=name, expected=", ".join(known))
    return RewardData(config, method, "ratings", "prompts", tuple(config.aspects) or known, records, tokens, words)


def _refuse_aspects(config: Reward, method: str) -> None:
    if config.aspects:
        raise ConfigError(
            f"`aspects` means nothing to {method}", field="aspects", found=config.aspects,
            expected=f"{Setting('method', 'rating')}",
        )  # fmt: skip


def read_rows(file: Path) -> list[dict[str, Any]]:
    with file.open(encoding="utf-8") as f:
        return [json.loads(line) for line in f if line.strip()]


@torch.no_grad()
def scored(
    scorer: Scorer, prompt_groups: Groups, method: str, layout: Any, room: int, device: torch.device
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of all answers, those of a group side by side: scores [n,K], lengths [n] in tokens, ratings [n,K]. Of steps: log-odds
    [m,1], the answers' lengths, and the shares of right [m]."""
    was = scorer.training
    scorer.eval()
    parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for group in bins(prompt_groups.sizes(layout).tolist(), room)[0]:
        batch = collate([prompt_groups[i] for i in group], layout).to(device)
        answers, found = answers_of(batch), scorer(batch)
        if method == "process":
            score = answers.tokens["step_score"]
            judged = ~score.isnan()
            parts.append((log_odds(found[own_places(batch)[judged]])[:, None], answers.lengths, score[judged]))
        else:
            parts.append((found[answers.last_position], answers.lengths, answers.per_completion.get("ratings", answers.lengths)))
    scorer.train(was)
    got, lengths, wanted = (torch.cat(column).double().cpu().numpy() for column in zip(*parts, strict=True))
    return got, lengths, wanted


def _share(row: dict[str, Any]) -> str:
    return f"{row['value']:.1%} [{row['low']:.1%}, {row['high']:.1%}]"


def _spread(row: dict[str, float]) -> str:
    return f"{row['mean']:.3g} ± {row['deviation']:.3g}, from {row['p0']:.3g} to {row['p100']:.3g}"
