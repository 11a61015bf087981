"""What happens when a loss is not finite: find the rows, save the batch, stop (promise 15)."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
from safetensors.torch import save_file

from tutelage.errors import TrainingStopped
from tutelage.files import whole_folder, write_json
from tutelage.train.step import Recipe, StepResult

if TYPE_CHECKING:
    from tutelage.data.loader import GlobalBatch
    from tutelage.models.interface import Batch


def stop_with_rows(recipe: Recipe, batch: GlobalBatch, result: StepResult, step: int, folder: Path) -> NoReturn:
    """Saves the offending micro-batch under `failure/step_N/` and raises `TrainingStopped` naming its records."""
    index = result.bad_micro if result.bad_micro is not None else 0
    micro = batch.micro[index]
    rows = _bad_rows(recipe, micro)
    names = [list(micro.rows[r]) for r in rows] if micro.rows is not None else []
    target = folder / "failure" / f"step_{step:06d}"
    with whole_folder(target) as out:
        tensors = {k: getattr(micro, k) for k in ("ids", "segments", "positions", "targets", "weights")}
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, out / "batch.safetensors")
        facts = {
            "step": step,
            "micro_batch": index,
            "rows": rows,
            "records": names,
            "loss": str(result.loss),
            "grad_norm": str(result.grad_norm),
        }
        write_json(out / "failure.json", facts)
    what = "loss" if not math.isfinite(result.loss) else "gradient"
    raise TrainingStopped(
        f"the {what} of step {step} is not finite; nothing was updated",
        file=target,
        found=f"loss {result.loss}, gradient norm {result.grad_norm}; rows {rows}, records {[n for row in names for n in row][:8]}",
        fix="look at these records; if they are sound, lower the learning rate or warm up longer; the last checkpoint is intact",
    )


@torch.no_grad()
def _bad_rows(recipe: Recipe, micro: Batch) -> list[int]:
    """Rows whose own loss is not finite; all rows when only the gradient is not."""
    bad = []
    for r in range(len(micro.ids)):
        row = _one_row(micro, r).to(recipe.device)
        terms = recipe.objective(recipe.parts, row)
        if not all(math.isfinite(t.sum.item()) for t in terms.values()):
            bad.append(r)
    return bad or list(range(len(micro.ids)))


def _one_row(batch: Batch, row: int) -> Batch:
    names = ("ids", "segments", "positions", "targets", "weights")
    return replace(batch, **{n: getattr(batch, n)[row : row + 1] for n in names}, rows=None)
