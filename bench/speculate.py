"""What guessing gives: a trained model alone, with guesses looked up in the text, and with those of a smaller trained model.

    python bench/speculate.py MODEL --draft MODEL [--rounds 5]

Prompts are beginnings of the Python documentation that Python brings along, 64 new tokens, greedy and sampled, 1 and 8 at a time.
Prints a JSON line a case: tokens a second over those without guesses, median of the rounds, and tokens per step and sequence. The
answers have to be the same.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import statistics
import time
from pathlib import Path
from typing import Any

NEW = 64


def run(engine: Any, prompts: list[list[int]], how: Any) -> tuple[float, int, list[tuple[int, ...]]]:
    """Seconds, steps and answers."""
    steps, began = 0, time.perf_counter()
    sequences = [engine.submit(p, how) for p in prompts]
    while not engine.idle:
        engine.step()
        steps += 1
    return time.perf_counter() - began, steps, [s.completion().ids for s in sequences]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--draft", required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    from tutelage.chat.render import Renderer
    from tutelage.engine import Engine, Sampling
    from tutelage.models.open import load
    from tutelage.references import find

    folder, small = (find(m, "model", args.runs).path for m in (args.model, args.draft))
    renderer, model, draft = Renderer(folder), load(folder), load(small)
    texts = [renderer.tokenizer.encode_text(t)[:100] for t in sorted(pydoc_data.topics.topics.values())]
    prompts = [t for t in texts if len(t) == 100][:16]
    for how in (Sampling(NEW, temperature=0.0, ignore_eos=True), Sampling(NEW, temperature=0.7, seed=1, ignore_eos=True)):
        for slots in (1, 8):
            ways: dict[str, dict[str, Any]] = {"none": {}, "lookup": {"speculate": 4}, "draft": {"draft": draft}}
            rates: dict[str, list[float]] = {name: [] for name in ways}
            engines = {name: Engine(model, slots=slots, prefix_cache=False, **options) for name, options in ways.items()}
            steps, answers = {}, {}
            for number in range(args.rounds + 1):  # the first is not counted: an engine learns in it whether guesses pay
                for name in list(ways)[:: -1 if number % 2 else 1]:
                    seconds, steps[name], answers[name] = run(engines[name], prompts, how)
                    rates[name] += [len(prompts) * NEW / seconds] if number else []
            assert answers["none"] == answers["lookup"] == answers["draft"], "guesses changed an answer"
            line: dict[str, Any] = {"job": "speculate", "greedy": how.greedy, "at_a_time": slots}
            for name in ways:
                ratio = statistics.median(a / b for a, b in zip(rates[name], rates["none"], strict=True))
                line[name] = {"ratio": round(ratio, 2), "tokens_per_step": round(len(prompts) * NEW / steps[name] / slots, 2)}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
