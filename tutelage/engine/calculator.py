"""A calculator for models: arithmetic read as a syntax tree and worked out step by step, never evaluated as code."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

from tutelage.errors import DataError

Number = int | float

MAX_CHARACTERS = 300
MAX_BITS = 4096  # of a whole number: some 1,200 digits

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
}  # fmt: skip
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_FUNCTIONS: dict[str, Callable[..., Any]] = {"min": min, "max": max, "abs": abs, "round": round, "sqrt": math.sqrt}


def calculate(expression: str) -> str:
    """The value of an arithmetic expression: + - * / // % **, parentheses, min, max, abs, round, sqrt.

    Raises `DataError` for anything else, for results that are too large, and where there is none (1/0).

    Example:
        >>> calculate("(2 + 3) * 4 / 8")
        '2.5'
    """
    if not isinstance(expression, str) or len(expression) > MAX_CHARACTERS:
        raise _wrong(expression, f"a text of at most {MAX_CHARACTERS} characters")
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
        raise _wrong(expression, f"an expression with a value ({error})") from error
    if isinstance(value, float) and not math.isfinite(value):
        raise _wrong(expression, "a value that is finite")
    return str(value) if isinstance(value, int) else f"{value:.12g}"


def _value(node: ast.expr) -> Number:
    """Raises `ValueError` for what is not arithmetic, and what arithmetic raises."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _limited(node.value)  # type: ignore[arg-type]
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _limited(_UNARY[type(node.op)](_value(node.operand)))
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow):
            _check_power(left, right)
        return _limited(_BINARY[type(node.op)](left, right))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS and not node.keywords:
        given = [_value(one) for one in node.args]
        if node.func.id == "round" and len(given) == 2 and abs(given[1]) > 30:
            raise ValueError("round to at most 30 digits")
        if node.func.id in ("min", "max") and len(given) == 1:
            return given[0]
        return _limited(_FUNCTIONS[node.func.id](*given))
    raise ValueError("only numbers, + - * / // % **, parentheses, " + ", ".join(_FUNCTIONS))


def _check_power(base: Number, exponent: Number) -> None:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * abs(exponent) > MAX_BITS:
        raise ValueError("the power is too large")


def _limited(value: Any) -> Number:
    """Two factors of MAX_BITS are quick to multiply; what comes out must be that small again."""
    if isinstance(value, complex):
        raise ValueError("a root of a negative number")
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise ValueError("the number is too large")
    return value  # type: ignore[no-any-return]


def _wrong(expression: object, expected: str) -> DataError:
    return DataError("this cannot be calculated", field="expression", found=expression, expected=expected)
