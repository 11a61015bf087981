"""What the prefix cache gives: 200 requests that share a beginning of 400 tokens, 16 new tokens each, with and without it.

    python bench/prefix.py [--rounds 5]

The 5.77M Qwen3 shape, random weights, 16 slots. Prints a JSON line: the median of the rounds' ratios of time without over with.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import common


def main() -> None:
    import torch

    from tutelage.engine import Engine, Sampling
    from tutelage.models.config import DecoderConfig
    from tutelage.models.init import build

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--shared", type=int, default=400)
    parser.add_argument("--new", type=int, default=16)
    args = parser.parse_args()
    model = build(DecoderConfig.from_hf(common.QWEN3), 0).eval()
    g = torch.Generator().manual_seed(0)
    beginning = torch.randint(2, common.VOCAB, (args.shared,), generator=g).tolist()
    prompts = [beginning + torch.randint(2, common.VOCAB, (20,), generator=g).tolist() for _ in range(args.requests)]
    how = Sampling(args.new, temperature=0.0, ignore_eos=True)
    ratios: list[float] = []
    answers: list[tuple[int, ...]] = []
    for number in range(args.rounds):
        seconds = {}
        for cached in (True, False) if number % 2 else (False, True):
            engine = Engine(model, slots=16, max_length=512, prefix_cache=cached)
            started = time.perf_counter()
            done = engine.generate(prompts, how)
            seconds[cached] = time.perf_counter() - started
            answers = answers or [c.ids for c in done]
            assert answers == [c.ids for c in done], "other answers with the cache than without"
        ratios.append(seconds[False] / seconds[True])
    print(json.dumps({"job": "prefix", "ratio": round(statistics.median(ratios), 2), "low": round(min(ratios), 2),
                      "high": round(max(ratios), 2), "requests_per_s": round(args.requests / seconds[True], 1)}))  # fmt: skip


if __name__ == "__main__":
    main()
