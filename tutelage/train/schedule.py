"""Learning rate over time, as a factor of the peak."""

from __future__ import annotations

import math

from tutelage.config.train import Schedule, warmup_steps


def factor(schedule: Schedule, step: int, steps: int) -> float:
    """Factor of the peak learning rate at `step` (0-based) of `steps`: never 0 in a step that is counted."""
    warmup = min(warmup_steps(schedule, steps), max(0, steps - 1))
    if step < warmup:
        return (step + 1) / (warmup + 1)
    span = max(1, steps - warmup)
    done = (step - warmup) / span  # 0 at the peak, below 1 at the last step
    low = schedule.final
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "linear":
        return 1.0 - (1.0 - low) * done
    if schedule.name == "cosine":
        return low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * done))
    decay = max(1, round(schedule.decay * steps))  # wsd: stable, then linear (MiniCPM, arXiv:2404.06395)
    left = steps - step
    return 1.0 if left > decay else low + (1.0 - low) * left / decay
