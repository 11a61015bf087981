"""What happens when a loss is not finite: find the rows, save the batch, stop (promise 15)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from safetensors.torch import save_file

from tutelage import log
from tutelage.errors import TrainingStopped
from tutelage.files import read_json, whole_folder, write_json
from tutelage.models.shard import leaves, local
from tutelage.train import distributed
from tutelage.train.step import StepConfig, StepResult, prepared, with_shared

if TYPE_CHECKING:
    from tutelage.data.tokens.loader import GlobalBatch
    from tutelage.models.interface import Batch

TENSORS = ("ids", "segments", "positions", "targets", "weights")


def stop_with_rows(recipe: StepConfig, batch: GlobalBatch, result: StepResult, step: int, folder: Path) -> NoReturn:
    """Saves the offending micro-batch under `failure/step_N/` (`rank_R` inside it where there are several ranks) and raises
    `TrainingStopped` naming its records. Every rank names the records of all."""
    for part in recipe.parts.values():
        part.zero_grad(set_to_none=True)
    target = folder / "failure" / f"step_{step:06d}"
    several = distributed.world() > 1
    index, rows = _culprits(recipe, batch, loss=not math.isfinite(result.loss))
    names = [names for part in batch.rows_apart(index) for names in (part.rows or ())[:1]]
    known = distributed.any_rank(rows=bool(rows))["rows"]
    if rows or (not known and log.rank() == 0):
        _save(target / f"rank_{log.rank()}" if several else target, batch.micro[index], index, rows, names, result, step)
    distributed.barrier()
    facts = [read_json(f) for f in sorted(target.glob("rank_*/failure.json" if several else "failure.json"))]
    names = [name for row in facts for record in row["records"] for name in record]
    what = "gradient" if math.isfinite(result.loss) else "loss"
    where = f"rows {[r for row in facts for r in row['rows']]}, records {names[:8]}" if known else "no row alone makes it so"
    damaged = [n for part in recipe.parts.values() for n, p in part.named_parameters() if not bool(local(p).isfinite().all())]
    if damaged:
        where = f"weights that were not finite before: {', '.join(damaged[:3])}"
    advice = "look at these records; if they are sound, lower the learning rate or warm up longer"
    kept = "; the last checkpoint is intact" if any((folder / "checkpoints").glob("step_*")) else ""
    raise TrainingStopped(
        f"the {what} of step {step} is not finite; nothing was updated",
        file=target,
        found=f"loss {result.loss}, gradient norm {result.grad_norm}; {where}",
        fix="start from a model whose weights are sound" if damaged else advice + kept,
    )


def _save(
    target: Path, micro: Batch, index: int, rows: list[int], names: list[tuple[str, ...]], result: StepResult, step: int
) -> None:
    facts: dict[str, Any] = {
        "step": step,
        "micro_batch": index,
        "rows": rows,
        "records": [list(names[r]) for r in rows] if names else [],
        "loss": str(result.loss),
        "grad_norm": str(result.grad_norm),
    }
    with whole_folder(target) as out:
        save_file({k: v.contiguous().cpu() for k, v in _tensors(micro).items()}, out / "batch.safetensors")
        write_json(out / "failure.json", facts)


def _tensors(micro: Batch) -> dict[str, torch.Tensor]:
    found = {k: getattr(micro, k) for k in TENSORS}
    if micro.answers is not None:
        found |= {f"answers.{k}": getattr(micro.answers, k) for k in ("positions", "targets", "completion_of", "last_position")}
        streams = {"tokens": micro.answers.tokens, "per_completion": micro.answers.per_completion}
        found |= {f"answers.{kind}.{k}": v for kind, named in streams.items() for k, v in named.items()}
    return found


def _culprits(recipe: StepConfig, batch: GlobalBatch, loss: bool) -> tuple[int, list[int]]:
    """The first micro-batch of this rank with rows that are not finite by themselves, and these rows: by their loss, or
    by their gradient. One pass a row: slow, but it happens once a run. All rows, because ranks with shards go together."""
    check = _finite_loss if loss else _finite_gradient
    shared = prepared(recipe, batch.micro, batch.counts)
    bad = [
        [r for r, row in enumerate(batch.rows_apart(i)) if not check(recipe, with_shared(row.to(recipe.device), shared))]
        for i in range(len(batch.micro))
    ]
    return next(((index, rows) for index, rows in enumerate(bad) if rows), (0, []))


@torch.no_grad()
def _finite_loss(recipe: StepConfig, row: Batch) -> bool:
    with recipe.autocast():
        terms = recipe.objective(recipe.parts, row)
    return all(math.isfinite(t.sum.item()) for t in terms.values())


def _finite_gradient(recipe: StepConfig, row: Batch) -> bool:
    """Looks at each gradient on its way to the parameter: of a shard, what arrives there is the sum over ranks."""
    found: list[bool] = []
    watched = [p for part in recipe.parts.values() for p in leaves(part) if p.requires_grad]
    handles = [p.register_hook(lambda grad: found.append(bool(grad.isfinite().all()))) for p in watched]
    with recipe.autocast():
        terms = recipe.objective(recipe.parts, row)
    torch.stack([t.sum for t in terms.values()]).sum().backward()
    for handle in handles:
        handle.remove()
    for part in recipe.parts.values():
        part.zero_grad(set_to_none=True)
    return all(found)
