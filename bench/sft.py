"""Our side of supervised fine-tuning: GSM8K packed best-fit, samples isolated, only answers supervised; real tokens/s.

    python bench/sft.py --data DATA --tokenizer FOLDER --steps 10 --warmup 2

`DATA/gsm8k/train.jsonl` has `question` and `answer`. Prompts and answers are written as in TRL's script, in the same tokenizer,
and go through our own records, token shards, packing and loop. Padding is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import common
import pretrain


def write_records(source: Path, folder: Path) -> None:
    """A records artifact of prompt/completion conversations; one of them is held out, since both splits are expected."""
    from tutelage.files import write_json
    from tutelage.records import SCHEMA_VERSION, Conversation, Message, dump_line

    lines = []
    for line in source.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        turns = [
            Message(role="user", content=f"Question: {row['question']}\nAnswer:"),
            Message(role="assistant", content=" " + row["answer"]),
        ]
        lines.append(dump_line(Conversation.make(turns, source="gsm8k", style="completion")) + "\n")
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("".join(lines[1:]), encoding="utf-8")
    (folder / "validation.jsonl").write_text(lines[0], encoding="utf-8")
    write_json(folder / "schema.json", {"type": "Conversation", "version": SCHEMA_VERSION})


def source_of(args: argparse.Namespace, scratch: Path) -> Any:
    from tutelage.data.tokens.loader import StaticSource
    from tutelage.data.tokens.shards import Segments, tokenize

    write_records(args.data / "gsm8k" / "train.jsonl", scratch / "records")
    tokenize(scratch / "records", args.tokenizer, scratch / "tokens", workers=1)
    segments = Segments.open(scratch / "tokens" / "train")
    return StaticSource(
        segments, row_length=args.row_length, rows_per_step=args.batch, micro_rows=args.micro, seed=0, packing=args.packing,
        trim=args.packing == "none",
    )  # fmt: skip


def main() -> None:
    parser = pretrain.arguments(__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--row_length", type=int, default=common.SEQUENCE)
    parser.add_argument("--lora", type=int, default=0, help="rank of an adapter on all linear layers; 0 trains all weights")
    parser.add_argument("--quantize", default="none", choices=["none", "nf4"], help="how the base of an adapter is held")
    parser.add_argument("--packing", default="best_fit", choices=["best_fit", "none"])
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    with tempfile.TemporaryDirectory() as scratch:
        source = source_of(args, Path(scratch))
        model = pretrain.build(args)
        if args.lora:
            from tutelage.config.adapter import Adapter
            from tutelage.models.adapters.attach import attach_adapter

            attach_adapter(model, Adapter(kind="lora", rank=args.lora, alpha=2 * args.lora, quantize=args.quantize), seed=0)
        steps = common.Steps(args.warmup)
        losses = pretrain.train(source, model, args, steps)
    adapter = (f"_lora{args.lora}" if args.lora else "") + (f"_{args.quantize}" if args.quantize != "none" else "")
    report, each = source.report, round(sum(steps.amounts) / len(steps.amounts))
    common.emit(
        "sft", f"tutelage{'' if args.packing == 'best_fit' else '_unpacked'}{adapter}{args.label}", **steps.fields(),
        base_rss_mb=args.base_rss_mb, fill=round(report["fill"], 3), tokens_per_step=each,
        segments=int(report["segments"]), loss_start=round(losses[0], 4), loss_end=round(losses[-1], 4),
        micro_rows=args.micro, kernels=args.why_no_kernels or "on",
    )  # fmt: skip


if __name__ == "__main__":
    main()
