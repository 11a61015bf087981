"""Generation: sequences, a scheduler, a slotted key-value cache and a runner, joined by `Engine`."""

from tutelage.engine.engine import Engine
from tutelage.engine.sequence import Completion, Event, Sampling, Sequence, TokenScore

__all__ = ["Completion", "Engine", "Event", "Sampling", "Sequence", "TokenScore"]
