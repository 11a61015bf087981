"""The side of a worker that may be killed: loads one function and answers questions with it until the other side closes."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOM = 1 << 30  # bytes of address space beyond what the process starts with


def main() -> None:
    """The first line tells the target; what functions print goes to stderr, since stdout is for answers."""
    sys.path.append(sys.path.pop(0))
    source, sink = sys.stdin.buffer, os.dup(1)
    os.dup2(2, 1)
    told = json.loads(source.readline())
    try:
        function = load(told["target"])
        function = {"function": lambda own: own, "reward": scored, "environment": hosted}[told["role"]](function)
        if told["bounded"]:
            _limit("RLIMIT_AS", _address_space() + ROOM)
    except BaseException:
        _say(sink, {"error": traceback.format_exc()})
        return
    _say(sink, {})
    for line in source:
        asked = json.loads(line)
        if told["bounded"]:
            _limit("RLIMIT_CPU", math.ceil(time.process_time() + asked["seconds"]))
        _say(sink, _answer(function, asked["question"]))


def load(target: str) -> Callable[[Any], Any]:
    """The function of `module:function`, the working folder's modules included, or of `file.py:function`."""
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
    found: Callable[[Any], Any] = getattr(module, name)
    if not callable(found):
        raise TypeError(f"{name} in {place} is no function")
    return found


def scored(function: Callable[..., Any]) -> Callable[[Any], float]:
    from tutelage.records import Rollout, from_json

    return lambda question: float(function(from_json(Rollout, question)))


def hosted(environment: Callable[..., Any]) -> Callable[[Any], str | float | None]:
    """Steps of many episodes at once, each `{"episode": its number}` and what is asked: to begin with `prompt` and `seed`, to
    reply to `answer`, or else for its score, after which the episode is gone."""
    from tutelage.records import Prompt, from_json

    missing = [name for name in ("reply", "score") if not callable(getattr(environment, name, None))]
    if missing:
        raise TypeError(f"an environment is a class with the methods reply and score; it has no {' and no '.join(missing)}")
    there: dict[int, Any] = {}

    def step(asked: dict[str, Any]) -> str | float | None:
        number = asked["episode"]
        if "prompt" in asked:
            there[number] = environment(from_json(Prompt, asked["prompt"]), asked["seed"])
            return None
        if number not in there:
            raise LookupError("its process ended between two steps of the episode")
        if "answer" not in asked:
            return float(there.pop(number).score())
        reply = there[number].reply(asked["answer"])
        if reply is None or isinstance(reply, str):
            return reply
        raise TypeError(f"reply() gave {type(reply).__name__}, not a text or None")

    return step


def _answer(function: Callable[[Any], Any], question: Any) -> dict[str, Any]:
    try:
        return {"value": function(question)}
    except MemoryError:
        return {"lost": "took more memory than it may"}
    except BaseException as error:
        shown = error.__traceback__.tb_next if error.__traceback__ else None
        return {"error": "".join(traceback.format_exception(type(error), error, shown, limit=-8))}


def _say(sink: int, what: dict[str, Any]) -> None:
    try:
        data = json.dumps(what).encode() + b"\n"
    except (TypeError, ValueError) as error:
        data = json.dumps({"error": f"{type(error).__name__}: {error}"}).encode() + b"\n"
    with contextlib.suppress(BrokenPipeError):
        while data:
            data = data[os.write(sink, data) :]


def _limit(kind: str, value: int) -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        limit = getattr(resource, kind)
        resource.setrlimit(limit, (value, resource.getrlimit(limit)[1]))


def _address_space() -> int:
    try:
        with open("/proc/self/statm", encoding="ascii") as f:
            return int(f.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux: a guess
        return ROOM
