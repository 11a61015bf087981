"""A trained model's answers in any company: how far log-probabilities differ, and where greedy choices do; and what 8 bits cost.

    python bench/order.py MODEL [--prompts 64] [--new 64]

MODEL is a folder or a run. Prompts are beginnings of the Python documentation that Python brings along, of many lengths;
answers are greedy and sampled. The reference is one prompt at a time, without prefix cache or guesses; against it: 16 at a
time, shuffled, with the prefix cache, with guesses, prompts read in parts, torch alone; then the same among themselves with
`batch_invariant`. Up to the first position where two answers part, the largest difference of log-probabilities is taken, and
the gap between the two most likely tokens there: under 2e-4 it counts as a tie, else as an error. Then bits per token that the
model gives those texts, in float32 and in 8 bits, and how often its most likely token is the same. Prints JSON lines.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import random
from pathlib import Path
from typing import Any

TIE = 2e-4


def answers(engine: Any, prompts: list[list[int]], how: Any, order: list[int]) -> list[Any]:
    done = engine.generate([prompts[i] for i in order], how)
    back = dict(zip(order, done, strict=True))
    return [back[i] for i in range(len(prompts))]


def difference(want: list[Any], got: list[Any]) -> dict[str, Any]:
    """Over all answers: largest difference of log-probabilities, and what happened where tokens differ."""
    worst, ties, errors, bits = 0.0, 0, 0, True
    for a, b in zip(want, got, strict=True):
        for x, y in zip(a.scores, b.scores, strict=False):
            worst = max(worst, abs(x.logprob - y.logprob) if x.id == y.id else 0.0)
            bits = bits and x.id == y.id and x.logprob == y.logprob
            if x.id != y.id:
                close = x.top[0][1] - x.top[1][1] < TIE
                ties, errors = ties + close, errors + (not close)
                break
    return {"largest_difference": worst, "ties": ties, "errors": errors, "equal_bits": bits}


def eight_bits(folder: Path, texts: list[list[int]]) -> dict[str, float]:
    """Bits per token of given texts and agreement of the most likely token, teacher forced, through the engine's own steps."""
    import math

    import torch

    from tutelage.engine import Engine
    from tutelage.engine.runner import Work
    from tutelage.engine.sequence import Sampling, Sequence
    from tutelage.models.open import load
    from tutelage.tokenizer.detokenize import TextStream

    out: dict[str, float] = {}
    best = {}
    for dtype in ("float32", "int8"):
        engine = Engine(load(folder), slots=1, dtype=dtype, batch_invariant=True)
        total, count, tokens = 0.0, 0, []
        for ids in texts:
            reader = Sequence(list(ids), Sampling(), TextStream(None), seed=0, index=0, limit=1, ends=frozenset())
            reader.slot = 0
            with torch.inference_mode():
                logprobs = engine.runner.logits([Work(reader, list(ids[:-1]), len(ids) - 1)]).log_softmax(-1)
            total -= float(logprobs.gather(1, torch.tensor(ids[1:])[:, None]).sum())
            count += len(ids) - 1
            tokens += logprobs.argmax(-1).tolist()
        out[f"{dtype}_bits_per_token"] = round(total / count / math.log(2), 5)
        best[dtype] = tokens
    same = sum(a == b for a, b in zip(best["float32"], best["int8"], strict=True))
    return out | {"same_choice": round(same / len(best["int8"]), 4), "tokens": len(best["int8"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    args = parser.parse_args()
    from tutelage.chat.render import Renderer
    from tutelage.engine import Engine, Sampling
    from tutelage.models import kernels
    from tutelage.models.open import load
    from tutelage.references import find

    folder = find(args.model, "model", args.runs).path
    renderer, model = Renderer(folder), load(folder)
    length = model.config.max_position_embeddings
    rng = random.Random(0)
    texts = [renderer.tokenizer.encode_text(t) for t in sorted(pydoc_data.topics.topics.values())]
    whole = [t[:length] for t in texts if len(t) >= length // 2]
    prompts = [whole[i % len(whole)][: rng.randint(4, length - args.new)] for i in range(args.prompts)]
    shuffled = rng.sample(range(len(prompts)), len(prompts))
    plain = list(range(len(prompts)))
    for name, how in {
        "greedy": Sampling(args.new, temperature=0.0, logprobs=2, ignore_eos=True),
        "sampled": Sampling(args.new, temperature=0.8, top_p=0.95, seed=1, logprobs=2, ignore_eos=True),
    }.items():
        want = answers(Engine(model, renderer, slots=1, prefix_cache=False), prompts, how, plain)
        ways: dict[str, tuple[dict[str, Any], list[int]]] = {
            "batch 16": ({"slots": 16, "prefix_cache": False}, plain), "batch 16, shuffled": ({"slots": 16}, shuffled),
            "batch 7, prefix cache": ({"slots": 7}, plain), "guesses": ({"slots": 16, "speculate": 4}, shuffled),
            "small parts": ({"slots": 16, "prefill_tokens": 48}, shuffled),
        }  # fmt: skip
        for way, (options, order) in ways.items():
            got = answers(Engine(model, renderer, **options), prompts, how, order)
            print(json.dumps({"job": "order", "how": name, "way": way, **difference(want, got)}), flush=True)
        with kernels.disabled():
            got = answers(Engine(model, renderer), prompts, how, shuffled)
        print(json.dumps({"job": "order", "how": name, "way": "torch alone", **difference(want, got)}), flush=True)
        exact = [answers(Engine(model, renderer, batch_invariant=True, **o), prompts, how, order) for o, order in ways.values()]
        for way, got in zip(list(ways)[1:], exact[1:], strict=True):
            row = difference(exact[0], got)
            print(json.dumps({"job": "order", "how": name, "way": f"{way}, batch_invariant", **row}), flush=True)
    print(json.dumps({"job": "int8", **eight_bits(folder, whole[:60])}), flush=True)


if __name__ == "__main__":
    main()
