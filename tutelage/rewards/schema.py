"""JSON Schema as verifiers need it, by the library `jsonschema`: what a value does not fit, and which schemas can't be checked.

A schema without `$schema` is draft 2020-12; drafts 4, 6, 7 and 2019-09 are read as what they declare. `format` is an annotation,
as the drafts have it. A `$ref` must lead to a place in the schema itself, or to a draft: nothing is fetched from the network.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any

from tutelage.errors import ConfigError, MissingExtra

ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$schema", "$id", "id",
     "$defs", "definitions", "format", "$anchor", "$dynamicAnchor", "$recursiveAnchor", "then", "else", "minContains",
     "maxContains", "contentEncoding", "contentMediaType", "contentSchema"}
)  # fmt: skip
"""Keywords that validate nothing by themselves."""
DRAFTS = ("4", "6", "7", "2019-09", "2020-12")
REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
MAX_NOTE = 300  # characters


def check_schema(schema: Any, field: str) -> None:
    """Raises `ConfigError` naming the place of what can't be checked: no keyword of a schema is ignored silently. `MissingExtra`
    without `jsonschema`."""
    library()
    from jsonschema.exceptions import SchemaError
    from jsonschema_specifications import REGISTRY
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import specification_with

    if not isinstance(schema, bool | Mapping):
        raise ConfigError("not a schema", field=field, found=schema, expected="an object, true or false")
    draft = _draft(schema, field)
    try:
        draft.check_schema(schema)
    except SchemaError as error:
        place = ".".join([field, *map(str, error.absolute_path)])
        raise ConfigError("not a valid schema", field=place, found=error.instance, expected=error.message[:MAX_NOTE]) from error
    except (RecursionError, OverflowError) as error:
        raise ConfigError("the schema is nested too deeply, or a pattern is too large", field=field) from error
    resource = specification_with(draft.META_SCHEMA.get("$schema")).create_resource(schema)
    known = draft.VALIDATORS.keys() | ANNOTATIONS
    for inner, resolver in _subschemas(resource, REGISTRY.resolver_with_root(resource)):
        for key in inner:
            if key not in known:
                raise ConfigError(
                    f"`{key}` can't be checked", field=field, expected=f"keywords of its draft: {', '.join(sorted(known))}"
                )
        for key in REFERENCES & inner.keys():
            try:
                resolver.lookup(inner[key])
            except Unresolvable as error:
                raise ConfigError(
                    f"`{key}` refers to nothing in this schema, and nothing is fetched", field=field, found=inner[key],
                    expected="#/$defs/…",
                ) from error  # fmt: skip


def wrong(value: Any, schema: Any) -> str:
    """Where a value does not fit and why; an empty text if it fits. The schema has passed `check_schema`. A pattern in it may
    take any time, so that this belongs in a worker."""
    from jsonschema.exceptions import best_match

    error = best_match(_validator(json.dumps(schema, sort_keys=True)).iter_errors(value))
    return "" if error is None else f"{error.json_path}: {error.message}"[:MAX_NOTE]


def library() -> Any:
    """`jsonschema`. Raises `MissingExtra`."""
    try:
        import jsonschema
    except ImportError as error:
        raise MissingExtra("jsonschema", "rl", "the reward `json_schema`") from error
    return jsonschema


@functools.lru_cache(64)
def _validator(schema: str) -> Any:
    from jsonschema_specifications import REGISTRY

    loaded = json.loads(schema)
    draft = library().validators.extend(_draft(loaded, "schema"), {"multipleOf": _multiple_of})
    return draft(loaded, registry=REGISTRY)  # a registry that knows the drafts and fetches nothing


def _draft(schema: Any, field: str) -> Any:
    """The validator class of the draft that a schema declares."""
    validators = library().validators
    named = schema.get("$schema") if isinstance(schema, Mapping) else None
    if named is None:
        return validators.Draft202012Validator
    known = {validators.validator_for({"$schema": uri}, None) for uri in [named] if isinstance(uri, str)}
    found = next(iter(known), None)
    if found is None or found is validators.Draft3Validator:
        raise ConfigError("unknown draft", field=f"{field}.$schema", found=named, expected=f"a draft of {', '.join(DRAFTS)}")
    return found


def _subschemas(resource: Any, resolver: Any) -> Iterator[tuple[Mapping[str, Any], Any]]:
    """Each object schema inside, itself included, with what resolves its references."""
    if isinstance(resource.contents, Mapping):
        yield resource.contents, resolver
        for inner in resource.subresources():
            yield from _subschemas(inner, resolver.in_subresource(inner))


def _multiple_of(validator: Any, step: float, value: Any, schema: Any) -> Iterator[Any]:
    """Exact for the decimal numbers as they were written, where the library divides floats: 0.3 is a multiple of 0.1. Numbers of
    more than some thousand digits are multiples of nothing."""
    if not validator.is_type(value, "number"):
        return
    a, b = Decimal(str(value)), Decimal(str(step))
    sane = a.is_finite() and abs(a.adjusted()) <= 4000 and abs(b.adjusted()) <= 4000
    if not sane or (Fraction(a) / Fraction(b)).denominator != 1:
        yield library().ValidationError(f"{value!r} is not a multiple of {step}")
