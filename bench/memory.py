"""Peak memory of training beside what `plan/memory.py` says: several models and batches, each in a process of its own.

    python bench/memory.py

The comparison with peers at the same batch is part of `bench/run.py` (it comes with the pretraining runs).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

import common

# (size, rows in a forward pass, tokens in a row, optimizer, checkpointing)
CASES = (
    ("5.8m", 4, 512, "adamw", "none"),
    ("5.8m", 16, 512, "adamw", "none"),
    ("5.8m", 16, 512, "muon", "none"),
    ("5.8m", 16, 512, "adamw", "layer"),
    ("30m", 4, 512, "adamw", "none"),
)


def measure(size: str, rows: int, length: int, optimizer: str, checkpointing: str, kernels: bool) -> dict[str, Any]:
    """Two steps in this process; what it took, in bytes, and the estimate."""
    import torch

    import tutelage.train.loop  # noqa: F401
    from tutelage.config.train import Optimizer
    from tutelage.models import kernels as own
    from tutelage.models.config import DecoderConfig
    from tutelage.models.init import build
    from tutelage.models.interface import Batch
    from tutelage.objectives import objective
    from tutelage.plan.memory import compare, estimate, peak_rss
    from tutelage.plan.shape import derive
    from tutelage.train.optim import LearningRates, Optimizers

    own.use(kernels)
    on = own.available()
    shape = {**derive(size, common.VOCAB).architecture, "max_position_embeddings": length}
    predicted = estimate(shape, rows, length, optimizer, checkpointing=checkpointing, kernels=on, accumulate=False)  # type: ignore[arg-type]
    base = common.rss_mb() * 2**20
    model = build(DecoderConfig.from_hf(shape), seed=0)
    model.train()
    model.checkpointing = checkpointing
    parts: dict[str, torch.nn.Module] = {"policy": model}
    optimizers = Optimizers(parts, Optimizer(name=optimizer), LearningRates(1e-3, 1e-3, 1e-3))  # type: ignore[arg-type]
    for step in range(2):
        ids = torch.randint(common.VOCAB, (rows, length), generator=torch.Generator().manual_seed(step))
        batch = Batch.of(ids.tolist())
        term = objective("next_token")(parts, batch)["loss"]
        (term.sum / (rows * length)).backward()
        optimizers.step()
    found = compare(predicted, int(base), peak_rss())
    return {
        "predicted_mb": round(predicted.total / 2**20), "low_mb": round(predicted.low / 2**20),
        "high_mb": round(predicted.high / 2**20), "measured_mb": round(found.measured / 2**20), "inside": found.inside,
        "kernels": on, "terms_mb": {k: round(v / 2**20) for k, v in predicted.terms.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=int, help="run one case in this process")
    parser.add_argument("--kernels", type=int, default=1)
    args = parser.parse_args()
    if args.case is None:
        for case in range(len(CASES)):
            subprocess.run([sys.executable, __file__, "--case", str(case), "--kernels", str(args.kernels)], check=True)
        return
    size, rows, length, optimizer, checkpointing = CASES[args.case]
    name = f"{size}, {rows} x {length}, {optimizer}, checkpointing {checkpointing}"
    print(json.dumps({"job": "memory_plan", "peer": name, **measure(*CASES[args.case], kernels=bool(args.kernels))}), flush=True)


if __name__ == "__main__":
    main()
