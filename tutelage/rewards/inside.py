"""The side of a worker that may be killed: loads one function and answers questions with it until the other side closes."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import json
import math
import os
import reprlib
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOM = 1 << 30  # bytes of address space beyond what the process starts with
MAX_LINE, MAX_TRACE = 300, 20_000  # characters that are said of an exception, and of its traceback


def main() -> None:
    """The first line tells the target; what functions print goes to stderr, since stdout is for answers."""
    sys.path.append(sys.path.pop(0))
    source, sink = sys.stdin.buffer, os.dup(1)
    os.dup2(2, 1)
    told = json.loads(source.readline())
    try:
        own = load(told["target"])
        function = {"function": lambda own: own, "reward": scored, "environment": hosted}[told["role"]](own)
        if told["bounded"]:
            _limit("RLIMIT_AS", _address_space() + ROOM)
    except BaseException as error:
        _say(sink, raised(error))
        return
    _say(sink, {})
    for line in source:
        asked = json.loads(line)
        if told["bounded"]:
            _limit("RLIMIT_CPU", math.ceil(time.process_time() + asked["seconds"]))
        _say(sink, _answer(function, asked["question"], own))


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

    return lambda question: number(function(from_json(Rollout, question)), "it")


def hosted(environment: Callable[..., Any]) -> Callable[[Any], str | float | None]:
    """Steps of many episodes at once, each `{"episode": its number}` and what is asked: to begin with `prompt` and `seed`, to
    reply to `answer`, or else for its score, after which the episode is gone."""
    from tutelage.records import Prompt, from_json

    missing = [name for name in ("reply", "score") if not callable(getattr(environment, name, None))]
    if missing:
        raise TypeError(f"an environment is a class with the methods reply and score; it has no {' and no '.join(missing)}")
    there: dict[int, Any] = {}

    def step(asked: dict[str, Any]) -> str | float | None:
        episode = asked["episode"]
        if "prompt" in asked:
            there[episode] = environment(from_json(Prompt, asked["prompt"]), asked["seed"])
            return None
        if episode not in there:
            raise LookupError("its process ended between two steps of the episode")
        if "answer" not in asked:
            return number(there.pop(episode).score(), "score()")
        reply = there[episode].reply(asked["answer"])
        if reply is None or isinstance(reply, str):
            return reply
        raise TypeError(f"reply() gave {type(reply).__name__}, not a text or None")

    return step


def number(value: Any, who: str) -> float:
    """What a function of the user gave, as a float. Raises `TypeError`, in words, for what is none: a text is none either."""
    try:
        if not isinstance(value, str | bytes):
            return float(value)
    except Exception:  # of a type of the user's, which may raise anything
        pass
    shown = "None" if value is None else f"an integer of {value.bit_length():,} bits" if isinstance(value, int) else ""
    raise TypeError(f"{who} gave {shown or f'{type(value).__name__} {reprlib.repr(value)}'}, not a number")


def raised(error: BaseException, own: Any = None) -> dict[str, str]:
    """What `Answer` says of an exception: in a line, at which of the user's own lines, and the traceback. Where no line of
    theirs was reached (a wrong signature), it is the one that defines `own`."""
    said = list(traceback.TracebackException.from_exception(error).format_exception_only())
    line = " ".join((said[-1] if isinstance(error, SyntaxError) else "".join(said)).split())
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        places.append((error.filename, error.lineno))
    at = next((f"{_near(file)}:{row}" for file, row in reversed(places) if _is_own(file)), "") or _defined(own)
    trace = "".join(traceback.format_exception(error, limit=-8))
    return {"error": line[:MAX_LINE], "at": at, "trace": trace[-MAX_TRACE:]}


def _is_own(file: str) -> bool:
    """Whether a file is neither ours, nor Python's, nor of an installed library."""
    theirs = [Path(sysconfig.get_paths()[name]) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return not file.startswith("<") and not any(Path(file).is_relative_to(one) for one in (*theirs, Path(__file__).parents[1]))


def _defined(own: Any) -> str:
    try:
        return f"{_near(str(inspect.getsourcefile(own)))}:{inspect.getsourcelines(own)[1]}"
    except (TypeError, OSError):  # of no file
        return ""


def _near(file: str) -> str:
    """The path from the working folder, where it lies below."""
    path = Path(file)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _answer(function: Callable[[Any], Any], question: Any, own: Any) -> dict[str, Any]:
    try:
        return {"value": function(question)}
    except MemoryError:
        return {"lost": "took more memory than it may"}
    except BaseException as error:
        return raised(error, own)


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
