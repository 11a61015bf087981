"""Our side of pretraining tokens/s: the Qwen3-shaped model of 5.77M parameters through the real loop.

    python bench/pretrain.py --rows rows.npy --steps 10 --warmup 2

`rows.npy` holds int64 token ids [rows, 512]; without it rows are made of Python's own documentation. Batch 16 x 512, AdamW at a
constant 1e-3, clipping at 1, every row one segment: what the peers' scripts do.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import common


class RowsSource:
    """A loop's source over fixed rows."""

    def __init__(self, rows: Any, batch: int, micro: int) -> None:
        self.rows, self.batch, self.micro = rows, batch, micro

    def next(self, step: int) -> Any:
        import torch

        from tutelage.data.tokens.loader import GlobalBatch
        from tutelage.models.interface import Batch

        ids = self.rows[step * self.batch : (step + 1) * self.batch]
        assert len(ids) == self.batch, "not enough rows for so many steps"
        targets = torch.zeros_like(ids)
        targets[:, :-1] = ids[:, 1:]
        weights = torch.ones(ids.shape)
        weights[:, -1] = 0
        segments = torch.ones(ids.shape, dtype=torch.int32)
        positions = torch.arange(ids.shape[1]).repeat(len(ids), 1)
        parts = [slice(i, i + self.micro) for i in range(0, self.batch, self.micro)]
        micro = [Batch(ids[p], segments[p], positions[p], targets[p], weights[p]) for p in parts]
        return GlobalBatch(micro, {"tokens": float(weights.sum()), "processed": float(ids.numel())}, [])

    def largest(self) -> Any:
        return self.next(0)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def on_weights(self, version: int) -> None: ...


class Clock:
    """A hook that times steps and keeps losses."""

    def __init__(self, steps: common.Steps) -> None:
        self.steps = steps
        self.losses: list[float] = []

    def start(self, state: Any) -> None:
        self.steps.begin()

    def after_step(self, state: Any) -> None:
        self.losses.append(state.result.loss)
        self.steps.mark(state.step_tokens)

    def finish(self, state: Any) -> None: ...
    def close(self) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def train(source: Any, model: Any, args: argparse.Namespace, steps: common.Steps) -> list[float]:
    """Runs the loop; returns the loss of every step."""
    import torch

    from tutelage import log
    from tutelage.config.train import Optimizer, Schedule
    from tutelage.objectives import objective
    from tutelage.train.loop import Job
    from tutelage.train.loop import train as loop
    from tutelage.train.optim import LearningRates, Optimizers
    from tutelage.train.step import StepConfig

    parts, config = {"policy": model}, Optimizer(name=args.optimizer)
    clock = Clock(steps)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        metrics = log.Metrics(folder / "metrics.jsonl")
        recipe = StepConfig(parts, objective("next_token"), clip=1.0, dtype=getattr(torch, args.dtype))
        job = Job(
            recipe=recipe, source=source, optimizers=Optimizers(parts, config, LearningRates(1e-3, 1e-3, 1e-3)),
            schedule=Schedule(name="constant", warmup=0), steps=args.warmup + args.steps, folder=folder, metrics=metrics,
            hooks={"clock": clock}, checkpoint_seconds=1e9,
        )  # fmt: skip
        loop(job)
        metrics.close()
    return clock.losses


def arguments(doc: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--batch", type=int, default=common.BATCH, help="rows in a step")
    parser.add_argument("--micro", type=int, default=8, help="rows in a forward pass; the stages derive 8 for rows of 512")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--kernels", type=int, default=1)
    parser.add_argument("--compile", type=int, default=0)
    parser.add_argument("--label", default="")
    return parser


def build(args: argparse.Namespace) -> Any:
    """The model on this machine's kernels. Everything that is not the model is imported and compiled before `base_rss_mb`."""
    import torch

    import tutelage.train.loop  # noqa: F401
    from tutelage.models import kernels
    from tutelage.models.config import DecoderConfig
    from tutelage.models.init import build as make

    if args.threads:
        torch.set_num_threads(args.threads)
    kernels.use(bool(args.kernels))
    args.why_no_kernels = kernels.why_not()
    args.base_rss_mb = common.rss_mb()
    model = make(DecoderConfig.from_hf(common.QWEN3), seed=0)
    model.train()
    if args.compile:
        model.compile()
    return model


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=Path, help="int64 token ids [rows, 512] as .npy")
    args = parser.parse_args()
    import numpy as np
    import torch

    from tutelage.plan.flops import train_flops_per_token

    needed = (args.steps + args.warmup) * args.batch
    with tempfile.TemporaryDirectory() as scratch:
        file = args.rows
        if file is None:
            file = Path(scratch) / "rows.npy"
            common.make_rows(file, needed)
        rows = torch.from_numpy(np.load(file)[:needed].astype(np.int64))
    model = build(args)
    steps, started = common.Steps(args.warmup), time.perf_counter()
    losses = train(RowsSource(rows, args.batch, args.micro), model, args, steps)
    common.emit(
        "pretrain", "tutelage" + args.label, **steps.fields(), base_rss_mb=args.base_rss_mb, loss_start=round(losses[0], 4),
        loss_end=round(losses[-1], 4), params=sum(p.numel() for p in model.parameters()), micro_rows=args.micro,
        kernels=args.why_no_kernels or "on", total_s=round(time.perf_counter() - started, 1),
        flops_per_token=train_flops_per_token(common.QWEN3, rows.shape[1]),
    )  # fmt: skip


if __name__ == "__main__":
    main()
