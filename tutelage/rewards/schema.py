"""JSON Schema (2020-12) as verifiers need it: what a value does not fit, and which schemas can't be checked here."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any

from tutelage.errors import ConfigError

TYPES = {
    "object": (dict,), "array": (list,), "string": (str,), "number": (int, float), "integer": (int, float), "boolean": (bool,),
    "null": (type(None),),
}  # fmt: skip
ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$schema", "$id", "$defs",
     "definitions", "format"}
)  # fmt: skip
KNOWN = ANNOTATIONS | {
    "type", "enum", "const", "properties", "required", "additionalProperties", "patternProperties", "propertyNames", "items",
    "prefixItems", "contains", "minContains", "maxContains", "minItems", "maxItems", "uniqueItems", "minLength", "maxLength",
    "pattern", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minProperties", "maxProperties",
    "allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentRequired", "$ref",
}  # fmt: skip
_ONE, _MANY, _NAMED = (
    ("additionalProperties", "propertyNames", "items", "contains", "not", "if", "then", "else"),
    ("prefixItems", "allOf", "anyOf", "oneOf"),
    ("properties", "patternProperties", "$defs", "definitions"),
)


def check_schema(schema: Any, field: str, root: Any = None) -> None:
    """Raises `ConfigError` naming the place of a keyword that can't be checked: nothing in a schema is passed over."""
    root = schema if root is None else root
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise ConfigError("not a schema", field=field, found=schema, expected="an object, true or false")
    for key, value in schema.items():
        if key not in KNOWN:
            raise ConfigError(f"`{key}` can't be checked", field=f"{field}.{key}", expected=f"one of: {', '.join(sorted(KNOWN))}")
        if key in _ONE:
            check_schema(value, f"{field}.{key}", root)
        elif key in _MANY:
            for i, one in enumerate(value):
                check_schema(one, f"{field}.{key}.{i}", root)
        elif key in _NAMED:
            for name, one in value.items():
                check_schema(one, f"{field}.{key}.{name}", root)
        elif key == "type" and not set([value] if isinstance(value, str) else value) <= TYPES.keys():
            raise ConfigError("no such type", field=f"{field}.type", found=value, expected=f"of {', '.join(TYPES)}")
        elif key == "$ref" and _target(root, value) is None:
            raise ConfigError("refers to nothing in this schema", field=f"{field}.$ref", found=value, expected="#/$defs/…")


def wrong(value: Any, schema: Any, root: Any = None, place: str = "$") -> str:
    """Where a value does not fit and why; an empty text where it fits. The schema has passed `check_schema`."""
    root = schema if root is None else root
    if isinstance(schema, bool):
        return "" if schema else f"{place}: nothing is allowed"
    return (
        _plain(value, schema, place)
        or (_object(value, schema, root, place) if isinstance(value, dict) else "")
        or (_array(value, schema, root, place) if isinstance(value, list) else "")
        or _combined(value, schema, root, place)
    )


def _plain(value: Any, schema: Mapping[str, Any], place: str) -> str:
    if "type" in schema:
        names = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
        if not any(_is(value, name) for name in names):
            return f"{place}: not of type {' or '.join(names)}"
    if "const" in schema and not _same(value, schema["const"]):
        return f"{place}: not {schema['const']!r}"
    if "enum" in schema and not any(_same(value, one) for one in schema["enum"]):
        return f"{place}: none of {schema['enum']!r}"
    if isinstance(value, str):
        if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", math.inf):
            return f"{place}: {len(value)} characters"
        if "pattern" in schema and not re.search(schema["pattern"], value):
            return f"{place}: does not match {schema['pattern']}"
    if _is(value, "number"):
        low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
        above, below = schema.get("exclusiveMinimum", -math.inf), schema.get("exclusiveMaximum", math.inf)
        if not (low <= value <= high and (above < value or above == -math.inf) and (value < below or below == math.inf)):
            return f"{place}: {value} is out of bounds"
        if "multipleOf" in schema and not _is_multiple(Decimal(str(value)), Decimal(str(schema["multipleOf"]))):
            return f"{place}: no multiple of {schema['multipleOf']}"
    return ""


def _is_multiple(value: Decimal, step: Decimal) -> bool:
    """Exact, for numbers of up to some thousand digits; larger ones are no multiple of anything."""
    if not value.is_finite() or abs(value.adjusted()) > 4000 or abs(step.adjusted()) > 4000:
        return False
    return (Fraction(value) / Fraction(step)).denominator == 1


def _object(value: dict[str, Any], schema: Mapping[str, Any], root: Any, place: str) -> str:
    missing = [name for name in schema.get("required", ()) if name not in value]
    for name, needs in schema.get("dependentRequired", {}).items():
        missing += [other for other in needs if name in value and other not in value]
    if missing:
        return f"{place}: no `{missing[0]}`"
    if not schema.get("minProperties", 0) <= len(value) <= schema.get("maxProperties", math.inf):
        return f"{place}: {len(value)} properties"
    for name, inner in value.items():
        rules = [schema["properties"][name]] if name in schema.get("properties", {}) else []
        rules += [rule for pattern, rule in schema.get("patternProperties", {}).items() if re.search(pattern, name)]
        rules = rules or [schema.get("additionalProperties", True)]
        found = next(filter(None, (wrong(inner, rule, root, f"{place}.{name}") for rule in rules)), "")
        found = found or wrong(name, schema.get("propertyNames", True), root, f"{place}.{name} (its name)")
        if found:
            return found
    return ""


def _array(value: list[Any], schema: Mapping[str, Any], root: Any, place: str) -> str:
    if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", math.inf):
        return f"{place}: {len(value)} items"
    if schema.get("uniqueItems") and any(_same(a, b) for i, a in enumerate(value) for b in value[:i]):
        return f"{place}: an item comes twice"
    first = schema.get("prefixItems", [])
    for i, inner in enumerate(value):
        found = wrong(inner, first[i] if i < len(first) else schema.get("items", True), root, f"{place}[{i}]")
        if found:
            return found
    if "contains" in schema:
        fitting = sum(not wrong(inner, schema["contains"], root, place) for inner in value)
        if not schema.get("minContains", 1) <= fitting <= schema.get("maxContains", math.inf):
            return f"{place}: {fitting} items as `contains` has them"
    return ""


def _combined(value: Any, schema: Mapping[str, Any], root: Any, place: str) -> str:
    def why(rule: Any) -> str:
        return wrong(value, rule, root, place)

    if "$ref" in schema and (found := why(_target(root, schema["$ref"]))):
        return found
    if found := next(filter(None, map(why, schema.get("allOf", ()))), ""):
        return found
    if "anyOf" in schema and all(map(why, schema["anyOf"])):
        return f"{place}: fits none of anyOf"
    if "oneOf" in schema and (fitting := sum(not why(rule) for rule in schema["oneOf"])) != 1:
        return f"{place}: fits {fitting} of oneOf"
    if "not" in schema and not why(schema["not"]):
        return f"{place}: fits what `not` forbids"
    if "if" in schema:
        return why(schema.get("else" if why(schema["if"]) else "then", True))
    return ""


def _is(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    if name == "integer":
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return isinstance(value, TYPES[name])


def _same(a: Any, b: Any) -> bool:
    """Equality of JSON: 1 is 1.0, but no true."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return bool(a == b)


def _target(root: Any, reference: str) -> Any:
    found = root
    for part in reference.removeprefix("#").strip("/").split("/") if reference.startswith("#") else [""]:
        if not part and reference == "#":
            return root
        part = part.replace("~1", "/").replace("~0", "~")
        found = found.get(part) if isinstance(found, Mapping) else None
    return found
