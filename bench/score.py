"""Scoring against lm-evaluation-harness with its `hf` model: 1,000 requests of 250 four-way questions, batch 16, context 512.

    python bench/score.py --peers FOLDER --peer-scripts FOLDER --data FOLDER [--rounds 5]

The 5.77M Qwen3 shape, random weights, written once as a folder that both read. The peer's lmeval.py (in `--peer-scripts`) writes
the questions and scores them; ours reads the same file, encodes each pair as the harness does, and must get the same accuracies.
`alone` is the time inside the scoring call; `whole` from the file of questions to the accuracy, the model being loaded; `command`
from the start of the program, less what the peer's scores of texts take after it. Prints a JSON line per contender and round,
then the ratios: ours over theirs, median over rounds with a 95% bootstrap interval.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import compare
import generate
import run as driver

CONTEXT = 512


def ours(args: argparse.Namespace) -> None:
    """Our engine, in this process."""
    from tutelage.engine import Engine
    from tutelage.models.open import load
    from tutelage.tokenizer.load import TokenizerFolder

    tokenizer, engine = TokenizerFolder(args.weights), Engine(load(args.weights), slots=1)
    warm = [3] * 40
    engine.score([([*warm, 5], 40), ([*warm, 6, 7], 40)])
    started = time.perf_counter()
    with args.questions.open(encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    contexts = tokenizer.encode_batch([r["q"] for r in rows for _ in r["options"]])
    wholes = tokenizer.encode_batch([f"{r['q']} {o}" for r in rows for o in r["options"]])
    requests = []
    for context, whole in zip(contexts, wholes, strict=True):
        kept = whole[-(CONTEXT + 1) :]  # what the harness keeps of a text that is too long
        requests.append((kept, len(context) - (len(whole) - len(kept))))
    begun = time.perf_counter()
    sums = [float(logprobs.sum()) for logprobs in engine.score(requests)]
    alone = time.perf_counter() - begun
    score = {"acc,none": 0.0, "acc_norm,none": 0.0}
    for row, own in zip(rows, (sums[i : i + 4] for i in range(0, len(sums), 4)), strict=True):
        per_character = [s / len(o) for s, o in zip(own, row["options"], strict=True)]
        score["acc,none"] += (own.index(max(own)) == row["gold"]) / len(rows)
        score["acc_norm,none"] += (per_character.index(max(per_character)) == row["gold"]) / len(rows)
    record = {
        "job": "lmeval_choice", "peer": "tutelage", "requests_per_s": round(len(sums) / (time.perf_counter() - started), 2),
        "requests_per_s_scoring_only": round(len(sums) / alone, 2), "score": {k: round(v, 4) for k, v in score.items()},
    }  # fmt: skip
    print(json.dumps(record), flush=True)


def compare_all(args: argparse.Namespace, scratch: Path) -> None:
    weights, work = scratch / "weights", args.peers / "work"
    generate.write_weights(weights, "5m", work / "tokenizer")
    peer = [str(args.peers / "PEERS/bin/python"), str(args.peer_scripts / "lmeval.py"), "--data", str(args.data)]
    peer += ["--work", str(work), "--weights", str(weights)]
    questions = work / "lmeval" / "choice.jsonl"
    own = [sys.executable, str(Path(__file__).resolve()), "--ours", "--weights", str(weights), "--questions", str(questions)]
    contenders = {"lm_eval_hf": peer, "tutelage": own}
    records: list[dict[str, Any]] = []
    for number in range(args.rounds):
        for name in list(contenders)[:: -1 if number % 2 else 1]:
            found, errors = driver.run(contenders[name], 900)
            rows = [r for r in found if r["job"] == "lmeval_choice"]
            if not rows:
                raise SystemExit(f"{name} failed:\n{errors[-1500:]}")
            after = sum(r["seconds"] for r in found if r["job"] == "lmeval_rolling")
            rows[-1]["requests_per_s_command"] = round(1000 / (rows[-1]["wall_s"] - after), 2)
            records.append({**rows[-1], "peer": name, "round": number, "disturbed": rows[-1]["other_cpu"] > 0.1})
            print(json.dumps(records[-1]), flush=True)
    scores = {json.dumps(r["score"]) for r in records}
    assert len(scores) == 1, f"the contenders do not agree: {scores}"
    suffixes = {"alone": "_scoring_only", "whole": "", "command": "_command"}
    for what, suffix in suffixes.items():
        found_ratios = compare.ratios(records, "lmeval_choice", f"requests_per_s{suffix}")
        print(json.dumps({"job": f"score, {what}", "ratios": [r.to_json() for r in found_ratios]}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--questions", type=Path)
    compare.run_or_compare(parser, ours, compare_all)


if __name__ == "__main__":
    main()
