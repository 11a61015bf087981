"""What can be proven of a JSON schema: which types it is about, whether two exclude each other, whether a value can be finite."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

KINDS = {
    "type": "types", "const": "value", "enum": "values", "$ref": "reference",
    "anyOf": "schemas", "oneOf": "schemas", "allOf": "schemas", "prefixItems": "schemas",
    "items": "schema", "additionalProperties": "schema",
    "properties": "map", "patternProperties": "map", "$defs": "map", "definitions": "map", "required": "names",
    "minItems": "count", "maxItems": "count", "minLength": "count", "maxLength": "count",
    "minProperties": "count", "maxProperties": "count",
    "minimum": "number", "maximum": "number", "exclusiveMinimum": "number", "exclusiveMaximum": "number", "multipleOf": "number",
    "pattern": "pattern", "format": "text",
}  # fmt: skip
"""Every keyword that is enforced, and what its value is."""

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
DEFINITIONS = frozenset({"$defs", "definitions"})
_OF_TYPE = {
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "object": ("properties", "patternProperties", "additionalProperties", "required", "minProperties", "maxProperties"),
}
_COMBINE = ("anyOf", "oneOf", "allOf", "$ref")


def types(schema: dict[str, Any]) -> list[str]:
    """The types that a schema names, or that its keywords are about."""
    named = schema.get("type")
    if named is not None:
        return list(named) if isinstance(named, list) else [named]
    return [kind for kind, keywords in _OF_TYPE.items() if any(keyword in schema for keyword in keywords)]


def every(schema: Any) -> Iterator[Any]:
    """A schema and all schemas in it."""
    waiting = [schema]
    while waiting:
        yield (node := waiting.pop())
        waiting.extend(_children(node))


def _children(schema: Any) -> Iterator[Any]:
    for keyword, value in schema.items() if isinstance(schema, dict) else ():
        kind = KINDS.get(keyword)
        if kind == "schema":
            yield value
        elif kind == "schemas" and isinstance(value, list):
            yield from value
        elif kind == "map" and isinstance(value, dict):
            yield from value.values()


def target(root: Any, reference: str) -> Any:
    """What a reference inside `root` (#/...) points to, or None."""
    node = root
    for part in unquote(reference[1:]).split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, list) and key.isdecimal() and int(key) < len(node):
            node = node[int(key)]
        elif isinstance(node, dict) and key in node:
            node = node[key]
        else:
            return None
    return node


def combines(schema: Any) -> bool:
    """Whether a value has to fit several schemas at once here."""
    if not isinstance(schema, dict):
        return False
    used = [keyword for keyword in _COMBINE if keyword in schema]
    constraints = schema.keys() & KINDS.keys() - {*DEFINITIONS, *_COMBINE}
    many = isinstance(schema.get("allOf"), list) and len(schema["allOf"]) > 1
    return bool(used) and (many or len(used) > 1 or bool(constraints))


def has_patterns(schema: Any) -> bool:
    return isinstance(schema, dict) and bool(schema.get("patternProperties"))


def counts_repeats(schema: dict[str, Any]) -> bool:
    """Whether a name that is written twice may count twice towards minProperties: only declared ones come once at most."""
    is_open = schema.get("additionalProperties", True) is not False or has_patterns(schema)
    return bool(is_open and schema.get("minProperties", 0) > max(1, len(set(schema.get("required", ())))))


_CHARACTER = re.compile(r"\\(?:[pP](?:\{[^}]*\}|.)|[xuU](?:\{[^}]*\}|[0-9a-fA-F]+)|.)|.", re.DOTALL)
_NUL = re.compile(r"\\(?:x00|u0000|U00000000|[xuU]\{0+\})|\x00")


def without_nul(pattern: str) -> str:
    r"""The pattern without the character U+0000, where it stands or may stand in a class.

    llguidance takes a set of all control characters for one that holds the quotation mark and the backslash too (escaped in
    JSON, these are a backslash and a letter); without one of them it does not. Classes of plain letters stay as they are.

    Example:
        >>> without_nul('[^"]+')
        '[[^"]&&[^\\x00]]+'
    """
    out, at = [], 0
    while at < len(pattern):
        found = _CHARACTER.match(pattern, at)
        assert found is not None
        text = pattern[at : _class_end(pattern, at)] if found[0] == "[" else found[0]
        wide = any(c in text[1:] for c in "^\\[\x00") or min(text[1:], default="a") < " "
        risky = wide if text[0] == "[" else text[:2] in ("\\p", "\\P") or _NUL.fullmatch(text)
        out.append(f"[{text}&&[^\\x00]]" if risky else text)
        at += len(text)
    return "".join(out)


def _class_end(pattern: str, at: int) -> int:
    """Where the class that begins at `at` ends; classes may hold others."""
    level = 0
    while at < len(pattern):
        if pattern[at] == "[":
            level += 1
            at += 1 + (pattern[at + 1 : at + 2] == "^")
            at += pattern[at : at + 1] == "]"  # the first is a character
            continue
        if pattern[at] == "]":
            level -= 1
        at += 2 if pattern[at] == "\\" else 1
        if level == 0:
            break
    return min(at, len(pattern))


def disjoint(a: Any, b: Any) -> bool:
    """Whether no value that we write fits both, as far as types, constants and constant properties tell."""
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return False
    ours, theirs = _constants(a), _constants(b)
    if ours is not None and theirs is not None:
        return not any(x == y for x in ours for y in theirs)
    if "type" in a and "type" in b and not _wide(a) & _wide(b):
        return True
    if types(a) == types(b) == ["object"]:
        both = set(a.get("required", ())) & set(b.get("required", ()))
        left, right = a.get("properties", {}), b.get("properties", {})
        return any(disjoint(left.get(name), right.get(name)) for name in both)
    return False


def _wide(schema: dict[str, Any]) -> set[str]:
    named = set(types(schema))
    return named | {"integer"} if "number" in named else named


def _constants(schema: dict[str, Any]) -> list[Any] | None:
    """All values that fit, where the schema lists them and they are texts or truth values: numbers have several spellings."""
    listed = [schema["const"]] if "const" in schema else schema.get("enum")
    return listed if isinstance(listed, list) and all(isinstance(one, str | bool | None) for one in listed) else None


def has_finite(root: dict[str, Any]) -> bool:
    """Whether some finite value fits: no required property holds another of its kind for ever."""
    nodes = [*every(root)][::-1]  # what a schema holds before the schema
    ended: set[int] = set()  # ids of those that a finite value fits
    count = -1
    while count < len(ended):
        count = len(ended)
        for node in nodes:
            if id(node) not in ended and _ends(node, root, ended):
                ended.add(id(node))
    return id(root) in ended


def _ends(schema: Any, root: Any, ended: set[int]) -> bool:
    """Whether some finite value fits, given the schemas that are known to have one."""
    if not isinstance(schema, dict):
        return schema is not False
    holds = types(schema) in (["array"], ["object"])  # where other types are allowed, a plain value will do
    needed = [*schema.get("allOf", ()), *(_needed(schema) if holds else ())]
    if "$ref" in schema:
        needed.append(target(root, schema["$ref"]))
    return all(_known(one, ended) for one in needed) and any(_known(one, ended) for one in schema.get("anyOf", [True]))


def _known(schema: Any, ended: set[int]) -> bool:
    return id(schema) in ended if isinstance(schema, dict) else schema is not False


def _needed(schema: dict[str, Any]) -> Iterator[Any]:
    """Schemas of what every array or object must hold."""
    least, first, properties = schema.get("minItems", 0), schema.get("prefixItems", []), schema.get("properties", {})
    yield from (properties[name] for name in schema.get("required", ()) if name in properties)
    yield from first[:least]
    if least > len(first):
        yield schema.get("items", True)
