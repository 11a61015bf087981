"""Does it learn? Preferences with a known rule: DPO and PPO against the model that they start from, over several seeds.

    python bench/learning.py --model quickstart/chat --runs RUNS [--seeds 3] [--methods dpo,ppo] [--answered N] [--questions N]

The rule prefers answers of six tokens. The start's own answers to training questions are judged by it: pairs for DPO, a reward
for PPO. Then both models answer held-out questions, sampled, with the same noise: a win is an answer that the rule puts above the
start's. Prints a JSON line a run: wins, losses and ties, the win rate of decided questions with Wilson's interval, and the
divergence KL(policy || start) per answer and per token, estimated on the policy's own answers (k3). With `--methods reward`
a reward model learns another rule, of words, from pairs of real answers, and is asked of held-out ones.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np

WORDS = frozenset(["return", "returns", "returned", "value", "object", "string", "list", "file", "name", "given"])
RULE = {"short": {"kind": "length", "target": 6}}
RATES = {"lr": 2e-4, "matrix_lr": 2e-4, "embedding_lr": 2e-4}


def train(method: str, args: argparse.Namespace, data: Any, seed: int) -> Any:
    from tutelage import api

    if method == "ppo":
        return api.rl(
            model=args.model, data=data, method="ppo", rewards=RULE, batch=32, samples=4, max_tokens=48, steps=args.steps,
            kl=0.02, kl_in="reward", optimizer=RATES, seed=seed, runs=args.runs, probes=0,
        )  # fmt: skip
    answers = api.sample(
        model=args.model, data=data, rewards=RULE, samples=6, max_tokens=48, max_prompts=args.answered, seed=seed, runs=args.runs
    )
    pairs = api.select(answers=answers, data=data, make="preferences", seed=seed, runs=args.runs)
    return api.preference(
        model=args.model,
        data=pairs,
        method=method,
        beta=args.beta,
        batch=16,
        epochs=args.epochs,
        optimizer=RATES,
        seed=seed,
        runs=args.runs,
    )


def compare(start: Path, trained: Path, data: Any, seed: int, questions: int) -> dict[str, Any]:
    """Both models' answers to the held-out questions, judged by the rule."""
    from tutelage.chat.render import Renderer
    from tutelage.config.rewards import terms_of
    from tutelage.engine import Engine, Sampling
    from tutelage.evaluate.intervals import wilson
    from tutelage.models.open import load
    from tutelage.records import Prompt, read_records
    from tutelage.rewards.build import build
    from tutelage.rollout.sampler import Sampler

    prompts = list(read_records(data.path / "records" / "validation.jsonl", Prompt))[:questions]
    engines = [Engine(load(folder), Renderer(folder), slots=64) for folder in (start, trained)]
    rubric = build(terms_of(RULE))
    samplers = [Sampler(engine, Sampling(48)) for engine in engines]
    made = [[g[0] for g in s.answer(prompts, 1, seed=1000 + seed, step=0, version=0)] for s in samplers]
    before, after = (np.array([v.reward for v in rubric.judge(rollouts)]) for rollouts in made)
    wins, losses = int((after > before).sum()), int((after < before).sum())
    asked = [((*r.prompt_ids, *r.ids), len(r.prompt_ids)) for r in made[1]]
    gaps = [q - p for q, p in zip(engines[0].score(asked), engines[1].score(asked), strict=True)]
    far = np.array([float((np.expm1(g) - g).sum()) for g in gaps])
    rate = wilson(wins, wins + losses)
    return {
        "wins": wins, "losses": losses, "ties": len(prompts) - wins - losses, "win_rate": round(rate.value, 3),
        "low": round(rate.low, 3), "high": round(rate.high, 3), "rule_before": round(float(before.mean()), 3),
        "rule_after": round(float(after.mean()), 3), "kl_per_answer": round(float(far.mean()), 3),
        "kl_per_token": round(float(far.sum() / sum(len(r.ids) for r in made[1])), 4),
    }  # fmt: skip


def judged(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """How often a reward model is right whose pairs are real answers, the better one that with the larger share of `WORDS`."""
    from tutelage import api

    answers = sorted({c.messages[-1].content for c in conversations(args)})
    rng, rows = random.Random(seed), []
    while len(rows) < args.pairs:
        pair = rng.sample(answers, 2)
        worth = [sum(word.strip(".,:()").lower() in WORDS for word in text.split()) / len(text.split()) for text in pair]
        if worth[0] != worth[1]:
            chosen, rejected = pair if worth[0] > worth[1] else pair[::-1]
            rows.append({"question": f"Say it well ({len(rows)}).", "chosen": chosen, "rejected": rejected})
    file = args.runs / f"rule_{seed}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = api.data(sources=[str(file)], kind="preferences", dedup="exact", validation_share=0.2, runs=args.runs)
    run = api.reward(model=args.model, data=data, batch=16, epochs=3, optimizer=RATES, seed=seed, runs=args.runs)
    found = run.facts["held_out"]
    ends = {name: {k: round(found[name][k], 3) for k in ("value", "low", "high")} for name in ("accuracy", "longer_wins")}
    return {
        "job": "learning",
        "method": "reward",
        "seed": seed,
        "seconds": run.facts["train_seconds"],
        "pairs": found["pairs"],
        **ends,
    }


def conversations(args: argparse.Namespace) -> list[Any]:
    from tutelage import api
    from tutelage.records import Conversation, read_records

    data = api.data(sources=["python-questions:"], kind="conversations", dedup="exact", runs=args.runs)
    return [
        c for c in read_records(data.path / "records" / "train.jsonl", Conversation) if len(c.messages[-1].content.split()) > 4
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100, help="of PPO")
    parser.add_argument("--answered", type=int, default=1500, help="training questions whose answers make DPO's pairs")
    parser.add_argument("--pairs", type=int, default=2500, help="of the reward model, a fifth of them held out")
    parser.add_argument("--epochs", type=float, default=3, help="of DPO")
    parser.add_argument("--beta", type=float, default=0.1, help="of DPO")
    parser.add_argument("--questions", type=int, default=610, help="held out, at most")
    parser.add_argument("--methods", default="dpo,ppo")
    args = parser.parse_args()
    from tutelage import api
    from tutelage.references import find

    data = api.data(sources=["python-questions:"], kind="prompts", dedup="exact", runs=args.runs)
    start = find(args.model, "model", args.runs).path
    for method in args.methods.split(","):
        for seed in range(args.seeds):
            if method == "reward":
                print(json.dumps(judged(args, seed)), flush=True)
                continue
            run = train(method, args, data, seed)
            row = {"job": "learning", "method": method, "seed": seed, "seconds": run.facts["train_seconds"]}
            print(json.dumps(row | compare(start, run.path / "model", data, seed, args.questions)), flush=True)


if __name__ == "__main__":
    main()
