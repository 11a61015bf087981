"""Stage `select`: judged answers -> good ones as conversations for `sft`, or best and worst as pairs for `preference`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from tutelage import log
from tutelage.config.stages import Select
from tutelage.data.clean import split
from tutelage.errors import DataError
from tutelage.files import whole_folder, write_json
from tutelage.records import SCHEMA_VERSION, Conversation, Preference, Prompt, Rollout, dump_line, read_records
from tutelage.rollout.choose import conversations, grouped, preferences, whole
from tutelage.rundir import RunDir
from tutelage.setup.sampling import read_prompts

TYPES = {"conversations": "Conversation", "preferences": "Preference"}


def run(config: Select, run: RunDir) -> dict[str, Any]:
    folder = run.input("answers")
    groups = grouped(read_records(folder / "train.jsonl", Rollout))
    if not groups:
        raise DataError(
            "there are no answers to choose from",
            file=folder / "train.jsonl",
            found="0 answers",
            fix="make some: tutelage sample",
        )
    known = {p.id: p for part in (split.TRAIN, split.VALIDATION) for p in read_prompts(run, part)}
    missing = next((p for p in groups if p not in known), None)
    if missing is not None:
        raise DataError(
            "these answers are to other prompts", field="data", found=f"no prompt {missing}", expected="the prompts of `sample`",
            fix="give the same data",
        )  # fmt: skip
    counts: Counter[str] = Counter()
    found = [row for prompt, group in groups.items() for row in chosen(config, known[prompt], group, counts)]
    for what, count in counts.items():
        log.say(f"  {what}: {count:,}")
    if not found:
        raise nothing_chosen(config, folder, groups.values())
    with whole_folder(run.folder("records")) as out:
        parts = write(out, found, config)
    return {**{key.replace(" ", "_"): count for key, count in counts.items()}, "records": len(found), "parts": parts}


def chosen(config: Select, prompt: Prompt, group: list[Rollout], counts: Counter[str]) -> Iterable[Conversation | Preference]:
    if config.make == "preferences":
        return preferences(prompt, group, config.margin, counts)
    return conversations(prompt, group, config.threshold, config.keep, counts)


def nothing_chosen(config: Select, folder: Path, groups: Collection[list[Rollout]]) -> DataError:
    """Why no answer was chosen, and what would help."""
    ended = [sorted(whole(group), key=lambda r: r.reward or 0.0) for group in groups]
    ended = [group for group in ended if group]
    answers = f"{sum(map(len, ended))} whole answers to {len(groups)} prompts"
    if not ended:
        return DataError(
            "no answer came to its end with a reward: nothing is to be learned from those that were cut", file=folder,
            found=f"{sum(map(len, groups))} answers, all cut at max_tokens or not judged", expected="answers that were ended",
            fix="sample with more max_tokens, or from a model that has learned to end its answers (sft)",
        )  # fmt: skip
    if config.make == "conversations":
        best = max(group[-1].reward or 0.0 for group in ended)
        return DataError(
            "no answer is good enough to learn from", file=folder, field="threshold", found=f"{config.threshold:g}",
            expected=f"at most {best:g}, the best reward of {answers}",
            fix="lower threshold, sample more answers, or start from a better model",
        )  # fmt: skip
    apart = [(g[-1].reward or 0.0) - (g[0].reward or 0.0) for g in ended if g[0].text != g[-1].text]
    most = max(apart, default=0.0)
    if most <= 0:
        return DataError(
            "the answers to each prompt are all worth the same: none is better than another", file=folder,
            found=answers, expected="answers to one prompt that differ in reward",
            fix="sample more answers, at a higher temperature, or with a reward that is not all or nothing",
        )  # fmt: skip
    return DataError(
        "no two answers to a prompt are far enough apart", file=folder, field="margin", found=f"{config.margin:g}",
        expected=f"at most {most:g}, the largest difference of rewards", fix="lower margin, or sample more answers",
    )  # fmt: skip


def write(out: Path, rows: list[Conversation | Preference], config: Select) -> dict[str, Any]:
    """The records artifact. Answers to one prompt stay on one side of the split."""
    parts = {split.TRAIN: {"records": 0, "bytes": 0}, split.VALIDATION: {"records": 0, "bytes": 0}}
    with (
        (out / "train.jsonl").open("w", encoding="utf-8") as train,
        (out / "validation.jsonl").open("w", encoding="utf-8") as held,
    ):
        for row in rows:
            side = split.VALIDATION if split.position(row.parents[0], config.seed) < config.validation_share else split.TRAIN
            (held if side == split.VALIDATION else train).write(dump_line(row) + "\n")
            parts[side]["records"] += 1
            parts[side]["bytes"] += _size(row)
    (out / "rejected.jsonl").write_text("")
    write_json(out / "card.json", {"parts": parts})
    write_json(out / "schema.json", {"type": TYPES[config.make], "version": SCHEMA_VERSION})
    return parts


def _size(row: Conversation | Preference) -> int:
    turns = row.messages if isinstance(row, Conversation) else (*row.prompt, *row.chosen, *row.rejected)
    return sum(len(((m.reasoning_content or "") + m.content).encode()) for m in turns)
