"""Our side of learning from people: DPO and reward models on hh-rlhf, GRPO on GSM8K's questions; pairs or completions a second.

    python bench/answers.py --job dpo --data DATA --tokenizer FOLDER [--steps 10 --warmup 2 --layout tree]

The 5.77M Qwen3 shape with random weights, the peers' own texts, tokenizer, batch (8 pairs; 16 completions, 8 a prompt), longest
text (512) and optimizer (AdamW). DPO reads the reference once, before its steps: `with_reference` counts that pass as if it
served one epoch only.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import pretrain


def preferences(data: Path, count: int) -> list[tuple[str, str, str]]:
    """The dialogue and the two last replies, as the peers' script cuts them."""
    rows = []
    with gzip.open(data / "hh-rlhf" / "harmless.jsonl.gz", "rt", encoding="utf-8") as f:
        for line in f:
            row = json.loads(line)
            head, mark, good = row["chosen"].rpartition("\n\nAssistant:")
            other, _, bad = row["rejected"].rpartition("\n\nAssistant:")
            if head == other:
                rows.append((head + mark, good, bad))
    return rows[:count]


def pairs(args: argparse.Namespace, scratch: Path) -> Any:
    from tutelage.data.groups.pairs import PreferencePairs
    from tutelage.data.tokens.shards import Segments, tokenize
    from tutelage.files import write_json
    from tutelage.records import SCHEMA_VERSION, Message, Preference, dump_line

    lines = []
    for prompt, good, bad in preferences(args.data, (args.steps + args.warmup + 1) * args.batch):
        turns = [Message(role=role, content=text) for role, text in (("user", prompt), ("assistant", good), ("assistant", bad))]
        lines.append(dump_line(Preference.make([turns[0]], [turns[1]], [turns[2]], source="hh", style="completion")) + "\n")
    records = scratch / "records"
    records.mkdir()
    for name, part in (("train", lines), ("validation", lines[:1])):
        (records / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
    write_json(records / "schema.json", {"type": "Preference", "version": SCHEMA_VERSION})
    tokenize(records, args.tokenizer, scratch / "tokens", workers=1)
    return PreferencePairs(Segments.open(scratch / "tokens" / "train"), common.SEQUENCE, "right")


def static(args: argparse.Namespace, scratch: Path, model: Any) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """(source, parts, facts) of jobs about pairs."""
    from tutelage.config.train import Tune
    from tutelage.data.groups.source import GroupSource
    from tutelage.setup.answers import reference_logprobs

    prompt_groups, parts, facts = pairs(args, scratch), {"policy": model}, {}
    if args.job == "dpo":
        started = time.perf_counter()
        config = Tune(micro_tokens=args.micro_tokens)
        prompt_groups.set_values(
            "reference", reference_logprobs(scratch / "reference", model, prompt_groups, config, args.layout, model.device)
        )
        facts["reference_s_per_pair"] = (time.perf_counter() - started) / len(prompt_groups)
    else:
        from tutelage.models.scorer import build_scorer

        parts = {"reward": build_scorer(model)}
    source = GroupSource(
        prompt_groups, per_step=args.batch, micro_tokens=args.micro_tokens, layout=args.layout, seed=0, unit="pairs"
    )  # fmt: skip
    return source, parts, facts


class Varied:
    """The peers' trivial reward: the share of different tokens."""

    def judge(self, rollouts: Any) -> list[Any]:
        from types import SimpleNamespace

        found = [len(set(r.ids)) / (1 + len(r.ids)) for r in rollouts]
        return [SimpleNamespace(reward=x, terms={"varied": x}, notes={}) for x in found]


def rollouts(args: argparse.Namespace, scratch: Path, model: Any) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    from tutelage.chat.render import Renderer
    from tutelage.config.stages import Rl
    from tutelage.records import Message, Prompt
    from tutelage.setup.rollouts import RolloutSetup

    rows = [json.loads(x) for x in (args.data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:512]]
    asked = [
        Prompt.make([Message(role="user", content=f"Question: {r['question']}\nAnswer:")], source="gsm8k", style="completion")
        for r in rows
    ]
    config = Rl(
        model="-", data="-", rewards={"exact": 1}, samples=args.generations, batch=args.batch // args.generations,
        max_tokens=args.length, max_length=common.SEQUENCE, micro_tokens=args.micro_tokens, layout=args.layout,
    )  # fmt: skip
    run = type("Run", (), {"folder": staticmethod(lambda name: scratch / name)})
    setup = RolloutSetup.of(config, run, model, Renderer(args.tokenizer), model.device, Varied())  # type: ignore[arg-type]
    return setup.source(asked), setup.parts, {}


def main() -> None:
    parser = pretrain.arguments(__doc__)
    parser.add_argument("--job", choices=["dpo", "reward", "grpo"], required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--layout", default="tree", choices=["tree", "packed", "rows"])
    parser.add_argument("--micro_tokens", type=int, default=4096)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    args = parser.parse_args()
    if "--batch" not in __import__("sys").argv:
        args.batch = 16 if args.job == "grpo" else 8
    steps = common.Steps(args.warmup)
    with tempfile.TemporaryDirectory() as folder:
        model = pretrain.build(args)
        build = rollouts if args.job == "grpo" else static
        source, parts, facts = build(args, Path(folder), model)
        losses = train(source, parts, args, steps)
        seconds = sum(json.loads(x)["rollout_seconds"] for x in [json.dumps(source.facts)]) if args.job == "grpo" else None
    unit = "completions" if args.job == "grpo" else "pairs"
    fields = steps.fields(unit)
    if "reference_s_per_pair" in facts:
        each = 1 / fields["pairs_per_s"] + facts["reference_s_per_pair"]
        fields["pairs_per_s_with_reference"] = round(1 / each, 2)
    if seconds is not None:
        fields["rollout_share_last"] = round(seconds / steps.seconds[-1], 3)
    name = f"tutelage{'' if args.layout == 'tree' else '_' + args.layout}{args.label}"
    common.emit(args.job, name, **fields, base_rss_mb=args.base_rss_mb, loss_start=losses[0], loss_end=losses[-1])


def train(source: Any, parts: dict[str, Any], args: argparse.Namespace, steps: common.Steps) -> list[float]:
    """The loop over any parts; a step is `batch` pairs or completions."""
    from tutelage import log
    from tutelage.config.train import Optimizer, Schedule
    from tutelage.objectives import objective
    from tutelage.train.loop import Job
    from tutelage.train.loop import train as loop
    from tutelage.train.optim import LearningRates, Optimizers
    from tutelage.train.step import StepConfig

    clock = pretrain.Clock(steps)
    mark, steps.mark = steps.mark, lambda amount: mark(args.batch)  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as scratch:
        metrics = log.Metrics(Path(scratch) / "metrics.jsonl")
        job = Job(
            recipe=StepConfig(parts, objective(args.job)), source=source,
            optimizers=Optimizers(parts, Optimizer(name=args.optimizer), LearningRates(1e-4, 1e-4, 1e-4)),
            schedule=Schedule(name="constant", warmup=0), steps=args.warmup + args.steps, folder=Path(scratch), metrics=metrics,
            hooks={"clock": clock}, checkpoint_seconds=1e9,
        )  # fmt: skip
        loop(job)
        metrics.close()
    return clock.losses


if __name__ == "__main__":
    main()
