"""What fine-tuning forgets, with and without replay of general text: bits per byte of the base's held-out documents before and
after, beside the skills that were taught.

python bench/replay.py --runs runs [--size 500k --steps 250]
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from tutelage import api

SETTINGS = ((0.0, 1.0), (0.2, 1.0), (0.5, 1.0), (0.5, 3.0))  # replay_share, replay_weight
SCHEDULE = {"name": "linear", "warmup": 0.02, "final": 0.05}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--size", default="500k")
    parser.add_argument("--steps", type=int, default=250, help="Steps of the base.")
    parser.add_argument("--lr", type=float, default=0.003, help="Learning rate of fine-tuning.")
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    common: dict[str, Any] = {"runs": args.runs}
    corpus = api.data(sources=["python-docs:"], chunk_chars=3000, validation_share=0.08, **common)
    words = api.tokenizer(data=corpus, vocab_size=1024, **common)
    skills = "skill:first_letter,last_letter,reverse,upper?count=600&held_out=40"
    chats = api.data(kind="conversations", sources=[skills], dedup="exact", **common)
    common |= {"threads": args.threads, "schedule": SCHEDULE}
    base = api.pretrain(
        data=corpus, tokenizer=words, size=args.size, steps=args.steps, sequence_length=256, batch_tokens=4096, **common
    )
    for share, weight in SETTINGS:
        replay = {"replay_share": share} | ({"replay_weight": weight} if share else {})
        run = api.sft(
            model=base, data=chats, general=corpus, lr=args.lr, epochs=3, batch_tokens=2048, max_documents=40, **replay, **common
        )
        scores = api.evaluate(model=run, questions=chats, max_tokens=16, runs=args.runs)
        tasks = json.loads((scores.path / "scores" / "scores.json").read_text(encoding="utf-8"))["questions"]["tasks"]
        effect = run.facts["adaptation_effect"]["general"]
        row = {
            "replay_share": share, "replay_weight": weight, "bits_before": round(effect["before"]["value"], 3),
            "bits_after": round(effect["after"]["value"], 3), "change": round(effect["share"]["value"], 3),
            "right": {task["task"]: round(task["correct"]["value"], 3) for task in tasks},
            "seconds": round(run.facts["seconds"], 1),
        }  # fmt: skip
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
