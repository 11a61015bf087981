"""Which parameter is trained by what: groups, decay rules, and the optimizers of a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from tutelage.config.train import Optimizer
from tutelage.models.shard import like, rows
from tutelage.train.muon import Muon


@dataclass(frozen=True, slots=True)
class LearningRates:
    """Peak learning rates, none of them left to derive."""

    lr: float  # norms, biases and, under adamw, matrices
    matrix_lr: float  # Muon's matrices
    embedding_lr: float  # token and position tables, output heads


TABLES_AND_HEADS = (
    "embed", "lm_head", "score.", "classifier.", "pooler.dense.bias", "shared.", "attention_bias", "wte", "wpe",
)  # fmt: skip


def kind(name: str, p: nn.Parameter) -> str:
    """matrix | embedding | vector, from the parameter's name and shape. What an adapter adds counts as vectors: no decay, and no
    orthogonal steps, since what its factors do they do together."""
    if ".change." in name or name.endswith("virtual.values"):
        return "vector"
    if any(part in name for part in TABLES_AND_HEADS):
        return "embedding"
    return "matrix" if p.ndim == 2 else "vector"


def groups(parts: dict[str, nn.Module]) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Trainable parameters by kind, names prefixed with their part, shared ones once, in a fixed order."""
    out: dict[str, list[tuple[str, nn.Parameter]]] = {"matrix": [], "embedding": [], "vector": []}
    seen: set[int] = set()
    for part, module in sorted(parts.items()):
        for name, p in module.named_parameters():
            if p.requires_grad and id(p) not in seen:
                seen.add(id(p))
                out[kind(name, p)].append((f"{part}.{name}", p))
    return out


class Optimizers:
    """The optimizers of a run as one: a step, a learning-rate factor, and state by parameter name."""

    def __init__(self, parts: dict[str, nn.Module], config: Optimizer, rates: LearningRates) -> None:
        by_kind = groups(parts)
        self.names = {id(p): name for rows in by_kind.values() for name, p in rows}
        self.params = [p for rows in by_kind.values() for _, p in rows]
        muon = config.name == "muon" and bool(by_kind["matrix"])
        adam = [
            {"params": [p for _, p in by_kind["embedding"]], "lr": rates.embedding_lr, "weight_decay": 0.0},
            {"params": [p for _, p in by_kind["vector"]], "lr": rates.lr, "weight_decay": 0.0},
        ]
        if not muon:
            adam.append({"params": [p for _, p in by_kind["matrix"]], "lr": rates.lr, "weight_decay": config.weight_decay})
        adam = [g for g in adam if g["params"]]
        self.all: list[torch.optim.Optimizer] = []
        if adam:
            self.all.append(torch.optim.AdamW(adam, betas=(config.beta1, config.beta2), eps=config.eps, fused=True))
        if muon:
            matrices = [p for _, p in by_kind["matrix"]]
            self.all.append(Muon(matrices, lr=rates.matrix_lr, momentum=config.momentum, weight_decay=config.weight_decay))
        self.by_name = {self.names[id(p)]: p for p in self.params}
        for opt in self.all:
            for group in opt.param_groups:
                group["peak_lr"] = group["lr"]

    @property
    def rate(self) -> float:
        """The learning rate of the first parameter group: the embedding's, where it is trained."""
        return float(self.all[0].param_groups[0]["lr"])

    def set_factor(self, factor: float) -> None:
        for opt in self.all:
            for group in opt.param_groups:
                group["lr"] = group["peak_lr"] * factor

    def step(self) -> None:
        for opt in self.all:
            opt.step()
        for p in self.params:
            p.grad = None

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Every state tensor under `<parameter>.<key>`."""
        out = {}
        for opt in self.all:
            for p, state in opt.state.items():
                for key, value in state.items():
                    out[f"{self.names[id(p)]}.{key}"] = torch.as_tensor(value)
        return out

    def rows(self, name: str) -> slice | None:
        """Which rows of the state tensor `<parameter>.<key>` this rank holds; None where it holds all."""
        return rows(self.by_name[name.rpartition(".")[0]])

    def load_state_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes what `state_tensors` gave; of a sharded model, the rows of this rank."""
        by_name: dict[str, dict[str, torch.Tensor]] = {}
        for full, value in tensors.items():
            name, _, key = full.rpartition(".")
            by_name.setdefault(name, {})[key] = value
        for opt in self.all:
            for group in opt.param_groups:
                for p in group["params"]:
                    state = by_name.get(self.names[id(p)])
                    if state:
                        here = {k: v.to(p.device).clone() for k, v in state.items()}
                        opt.state[p] = {k: like(p, v) if v.ndim else v for k, v in here.items()}
