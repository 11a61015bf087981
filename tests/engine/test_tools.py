"""Tools: what they give back, the calculator's limits, and the loop that runs them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tutelage.chat.tool_calls import ToolCall
from tutelage.engine.calculator import calculate
from tutelage.engine.tools import Reply, Tool, calculator, run_with_tools
from tutelage.errors import DataError


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("(2 + 3) * 4 / 8", "2.5"), ("-7 // 2", "-4"), ("7 % 4", "3"), ("2 ** 10", "1024"), ("0.1 + 0.2", "0.3"), ("1e3", "1000"),
        ("max(1, 2.5, -3)", "2.5"), ("min(4, 3)", "3"), ("abs(-2)", "2"), ("round(2.567, 1)", "2.6"),
        ("sqrt(2)", "1.41421356237"), ("-" * 298 + "1", "1"), ("2 ** -1", "0.5"), (" 3\n", "3"),
        ("9" * 20 + " + 1", "1" + "0" * 20),
    ],
)  # fmt: skip
def test_calculator(expression: str, value: str) -> None:
    """Guards the answers that a model is shown."""
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "", "1 +", "1 / 0", "__import__('os')", "().__class__", "x", "'a' * 3", "[1]", "1 if 1 else 2", "1 < 2", "lambda: 1",
        "True", "9 ** 9 ** 9", "2 ** 5000", "10 ** (10 ** 10)", "(-1) ** 0.5", "sqrt(-1)", "1e308 * 10", "1j",
        "round(1, -10 ** 9)", "max()", "abs(1, 2)", "min(key=1)", "(" * 250, "1" * 301, "(2 ** 4000) * (2 ** 4000)", "\x00",
    ],
)  # fmt: skip
def test_what_is_not_arithmetic_is_refused(expression: str) -> None:
    """Guards the machine: no code, no endless work, no number that fills the memory; always an error that a model can read."""
    with pytest.raises(DataError, match="cannot be calculated"):
        calculate(expression)


def scripted(*replies: Reply) -> Any:
    """A model that says these, one after the other, and keeps what it was shown."""
    left: Iterator[Reply] = iter(replies)

    def generate(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> Reply:
        generate.shown.append((messages, tools))  # type: ignore[attr-defined]
        return next(left)

    generate.shown = []  # type: ignore[attr-defined]
    return generate


def test_a_call_is_run_and_its_result_shown() -> None:
    """Guards the loop: calls in order, each answered under its id, until the model answers without one."""
    calls = (ToolCall("calculator", '{"expression": "2 + 2"}', "one"), ToolCall("calculator", '{"expression": "3 * 3"}', "two"))
    model = scripted(Reply("Let me see.", calls, "tool_calls"), Reply("4 and 9."))
    done = run_with_tools(model, [{"role": "user", "content": "?"}], [calculator])
    assert (done.finish_reason, done.rounds, done.content) == ("stop", 2, "4 and 9.")
    assert [m["role"] for m in done.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert [(m["tool_call_id"], m["content"]) for m in done.messages[2:4]] == [("one", "4"), ("two", "9")]
    assert done.messages[1]["tool_calls"] == [c.to_json() for c in calls]
    assert model.shown[1] == (list(done.messages[:4]), [calculator.to_json()])


def test_what_goes_wrong_is_told_to_the_model() -> None:
    """Guards agents: a wrong call is a mistake to learn from, a broken tool is an error of ours to see."""

    def broken() -> str:
        raise RuntimeError("our fault")

    calls = tuple(
        ToolCall(name, arguments)
        for name, arguments in [("calculatr", "{}"), ("calculator", '{"expr": "1"}'), ("calculator", '{"expression": "1/0"}')]
    )
    tools = [calculator, Tool("broken", "", {"type": "object"}, broken)]
    done = run_with_tools(scripted(Reply("", calls), Reply("")), [], tools)
    told = [m["content"] for m in done.messages if m["role"] == "tool"]
    for text, words in zip(told, ("there are calculator, broken", "wrong arguments", "division by zero"), strict=True):
        assert words in text
    with pytest.raises(RuntimeError, match="our fault"):
        run_with_tools(scripted(Reply("", (ToolCall("broken", "{}"),))), [], tools)


def test_the_loop_ends() -> None:
    """Guards against a model that calls for ever, and against running the calls of an answer that was cut off."""
    again = [Reply("", (ToolCall("calculator", '{"expression": "1"}'),)) for _ in range(9)]
    done = run_with_tools(scripted(*again), [], [calculator], max_rounds=3)
    assert (done.finish_reason, done.rounds, len(done.messages)) == ("max_rounds", 3, 5)
    cut = run_with_tools(scripted(Reply("", again[0].calls, "length")), [], [calculator])
    assert (cut.finish_reason, len(cut.messages)) == ("length", 1)
