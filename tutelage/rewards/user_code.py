"""What runs in a worker for code that the user wrote, and for our verifiers: each function makes what answers questions."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import reprlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def load(target: str) -> Callable[..., Any]:
    """The function of `module:function`, modules in the working folder included, or of `file.py:function`."""
    place, _, name = target.rpartition(":")
    sys.path.insert(0, os.getcwd())
    if place.endswith(".py"):
        path = Path(place).resolve()
        sys.path.insert(0, str(path.parent))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    found: Callable[..., Any] = getattr(module, name)
    if not callable(found):
        raise TypeError(f"{name} in {place} is no function")
    return found


def verifier(name: str) -> Callable[[Any], Any]:
    """A function of this folder, "module:function"."""
    module, _, function = name.rpartition(":")
    found: Callable[[Any], Any] = getattr(importlib.import_module(f"tutelage.rewards.{module}"), function)
    return found


def reward(target: str) -> Callable[[Any], float]:
    """The user's function, asked with the JSON of a `Rollout`, which it gets as a record."""
    from tutelage.records import Rollout, from_json

    function = load(target)

    @functools.wraps(function, updated=())
    def score(question: Any) -> float:
        return number(function(from_json(Rollout, question)), "it")

    return score


def environment(target: str) -> Callable[[Any], str | float | None]:
    """Steps of many episodes of the user's class. A question is `{"episode": its number}` and one of: `prompt` and `seed`, to
    begin; `answer`, to reply to; neither, for the score, after which the episode is gone."""
    from tutelage.records import Prompt, from_json

    made = load(target)
    missing = [name for name in ("reply", "score") if not callable(getattr(made, name, None))]
    if missing:
        raise TypeError(f"an environment is a class with the methods reply and score; it has no {' and no '.join(missing)}")
    episodes: dict[int, Any] = {}

    @functools.wraps(made, updated=())
    def step(asked: dict[str, Any]) -> str | float | None:
        episode = asked["episode"]
        if "prompt" in asked:
            episodes[episode] = made(from_json(Prompt, asked["prompt"]), asked["seed"])
            return None
        if episode not in episodes:
            raise LookupError("its process ended between two steps of the episode")
        if "answer" not in asked:
            return number(episodes.pop(episode).score(), "score()")
        reply = episodes[episode].reply(asked["answer"])
        if reply is None or isinstance(reply, str):
            return reply
        raise TypeError(f"reply() gave {type(reply).__name__}, not a text or None")

    return step


def number(value: Any, who: str) -> float:
    """A result of a user's function as a float. Raises `TypeError`, in words, for what is no number, texts included."""
    try:
        if not isinstance(value, str | bytes):
            return float(value)
    except Exception:  # from a type of the user's, which may raise anything
        pass
    shown = "None" if value is None else f"an integer of {value.bit_length():,} bits" if isinstance(value, int) else ""
    raise TypeError(f"{who} gave {shown or f'{type(value).__name__} {reprlib.repr(value)}'}, not a number")
