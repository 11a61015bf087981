"""Every method's loss in numpy, from token log-probabilities: written from the papers, apart from the code that is tested."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tutelage.data.groups.groups import PromptGroup

Logs = Callable[[PromptGroup, int], np.ndarray]  # log-probabilities of the supervised tokens of a completion; -1: of the prompt


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def loss(method: str, prompt_groups: Sequence[PromptGroup], logs: Logs, **s: Any) -> float:
    """What the loop must report for one global batch."""
    if method == "kto":
        return kto(prompt_groups, logs, **s)
    each = [_pair(method, f, logs(f, 0), logs(f, 1), **s) for f in prompt_groups]
    total = float(np.mean(each))
    weight = {"orpo": 1.0, "cpo_simpo": 1.0, "cpo": s.get("sft", 1.0), "simpo": s.get("sft", 0.0)}.get(method, 0.0)
    chosen = np.concatenate(
        [logs(f, 0) for f in prompt_groups] + ([logs(f, -1) for f in prompt_groups] if s.get("prompts") else [])
    )
    return total - weight * float(chosen.mean())


def kto(
    prompt_groups: Sequence[PromptGroup],
    logs: Logs,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> float:
    ratio = [[logs(f, k).sum() - f.completions[k].per_completion["reference"] for k in (0, 1)] for f in prompt_groups]
    own, other = np.array(ratio).T
    point = max(0.0, other.mean())
    out = [
        desirable_weight * (1 - sigmoid(beta * (r - point)))
        if f.completions[0].per_completion["desirable"]
        else undesirable_weight * (1 - sigmoid(beta * (point - r)))
        for f, r in zip(prompt_groups, own, strict=True)
    ]
    return float(np.mean(out))


def _pair(method: str, group: PromptGroup, chosen: np.ndarray, rejected: np.ndarray, **s: Any) -> float:
    beta = s["beta"]
    c, r = (x.sum() - e.per_completion["reference"] for x, e in zip((chosen, rejected), group.completions, strict=True))
    mean_c, mean_r = c / len(chosen), r / len(rejected)
    p = sigmoid(beta * (c - r))  # that the chosen answer is the better one
    if method == "dpo":
        return -np.log(sigmoid(beta * (c - r) - s.get("offset", 0.0) * group.completions[0].per_completion["margin"]))
    if method == "cdpo":
        return -(1 - s["label_smoothing"]) * np.log(p) - s["label_smoothing"] * np.log(1 - p)
    if method == "robust":
        e = s["label_smoothing"]
        return ((1 - e) * -np.log(p) - e * -np.log(1 - p)) / (1 - 2 * e)
    if method == "dpo_norm":
        return -np.log(sigmoid(beta * (mean_c - mean_r)))
    if method == "ipo":
        difference = mean_c - mean_r if s.get("average", True) else c - r
        return (difference - 1 / (2 * beta)) ** 2
    if method == "hinge":
        return max(0.0, 1 - beta * (c - r))
    if method == "exo_pair":
        e = s["label_smoothing"]
        return p * np.log(p / (1 - e)) + (1 - p) * np.log((1 - p) / e)
    if method == "discopop":
        m = beta * (c - r)
        return -np.log(sigmoid(m)) * (1 - sigmoid(m / s["tau"])) + np.exp(-m) * sigmoid(m / s["tau"])
    if method == "nca_pair":
        a, b = sigmoid(beta * c), sigmoid(beta * r)
        return -np.log(a) - (np.log(1 - a) + np.log(1 - b)) / 2
    if method == "sppo_hard":
        return (c - 1 / (2 * beta)) ** 2 + (r + 1 / (2 * beta)) ** 2
    if method == "apo_zero":
        return (1 - sigmoid(beta * c)) + sigmoid(beta * r)
    if method == "apo_down":
        return sigmoid(beta * c) + (1 - sigmoid(beta * (c - r)))
    if method == "orpo":
        p_c, p_r = np.exp(chosen.mean()), np.exp(rejected.mean())
        ratio = (p_c / (1 - p_c)) / (p_r / (1 - p_r))
        return -beta * np.log(sigmoid(np.log(ratio)))
    if method in ("simpo", "cpo_simpo"):
        return -np.log(sigmoid(beta * (chosen.mean() - rejected.mean()) - s["gamma"]))
    assert method == "cpo"
    return -np.log(sigmoid(beta * (chosen.sum() - rejected.sum())))
