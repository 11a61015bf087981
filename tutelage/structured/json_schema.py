"""JSON schemas as a grammar can enforce them: every keyword is enforced or refused, and what a schema leaves open gets a bound.

A model that repeats itself writes digits, spaces or letters for ever where a grammar lets it. So numbers, strings, lists and
values without a schema are bounded here. Every change takes a part of what the schema allows and adds nothing: whatever is
written is valid by the schema as it was given (JSON Schema 2020-12).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

from tutelage.errors import ConfigError
from tutelage.structured.patterns import check_pattern, places
from tutelage.structured.schema_proofs import (
    DEFINITIONS,
    KINDS,
    TYPES,
    combines,
    counts_repeats,
    disjoint,
    every,
    has_finite,
    has_patterns,
    target,
    types,
    without_nul,
)

MAX_SCHEMAS = 500  # schemas in a schema: the compiler's time grows with the square of an object's properties
MAX_VALUES = 2000  # of all enums
MAX_LEVELS = 32  # the compiler's JSON reader stops at 128 levels of brackets, and a schema takes up to three

_EXPECTED = {
    "types": f"one or a list of {', '.join(TYPES)}", "values": "a list that is not empty", "names": "a list of names",
    "reference": "a reference inside this schema: #/...", "schemas": "a list of schemas", "schema": "a schema",
    "map": "an object of schemas", "count": "a whole number from 0", "number": "a finite number",
    "pattern": "a regular expression", "text": "a text",
}  # fmt: skip
_ANNOTATIONS = frozenset(
    {
        "title", "description", "default", "example", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$schema",
        "$id", "id", "$anchor", "contentMediaType", "contentEncoding", "discriminator",
    }
)  # fmt: skip
_ANY = "tutelage-any-"

_LEAP = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DAY = "(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
_YEAR = "(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"  # many calendars and libraries have no year 0
_DATE = f"(?:{_YEAR}-{_DAY}|{_LEAP}-02-29)"
_TIME = "(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:[.][0-9]{1,9})?(?:[zZ]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_N = "[0-9]{1,9}"
_DAYS = f"(?:{_N}Y(?:{_N}M(?:{_N}D)?)?|{_N}M(?:{_N}D)?|{_N}D)"
_HOURS = f"T(?:{_N}H(?:{_N}M(?:{_N}S)?)?|{_N}M(?:{_N}S)?|{_N}S)"
_FORMATS = {
    "date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}[tT]{_TIME}$",
    "duration": f"^P(?:{_DAYS}(?:{_HOURS})?|{_HOURS}|{_N}W)$",
}  # fmt: skip
"""Formats whose digits the compiler does not bound, or whose leap days and seconds it does not check (RFC 3339)."""
_ALL = sorted({*TYPES} - {"integer"})
_FORMAT_LENGTHS = {"hostname": 253, "email": 254, "uri": 2000}


@dataclass(slots=True, frozen=True)
class Bounds:
    """What ends a value that its schema leaves open.

    Example:
        >>> prepare({"type": "string"}, Bounds(string=80))
        {'type': 'string', 'maxLength': 80}
    """

    string: int = 8192  # characters of a string without maxLength
    magnitude: int = 10**15  # of a number without minimum or maximum; whole numbers up to here are exact in a double
    decimals: int = 9  # digits behind the point of a number without multipleOf
    name: int = 128  # characters of a property's name that the schema does not declare
    items: int = 1024  # of an array without maxItems, and properties of an object that declares none
    levels: int = 6  # of arrays and objects inside a value without a schema


def prepare(schema: Any, bounds: Bounds | None = None) -> dict[str, Any]:
    """The schema checked, bounded and without annotations.

    Raises `ConfigError` naming the place and keyword that cannot be enforced, and for a schema that no finite value fits.
    """
    walk = _Walk(schema, bounds or Bounds())
    done = walk.schema(schema, "#", 0)
    walk.check_references()
    if done is False:
        raise ConfigError("nothing fits the schema false", field="#", found=False, expected="a schema")
    definitions = {f"{_ANY}{level}": walk.any_value(level) for level in range(walk.deepest + 1)}
    if definitions:
        done["$defs"] = done.get("$defs", {}) | definitions
    if not has_finite(done):
        fix = "let the recursion end: make a property optional, or offer null"
        raise ConfigError("no finite value fits the schema", field="#", fix=fix)
    return dict(done)


class _Walk:
    """One pass over a schema. `where` is the JSON pointer of a place in it, `level` how deep it lies."""

    def __init__(self, root: Any, bounds: Bounds) -> None:
        self.root, self.bounds = root, bounds
        self.seen: set[str] = set()  # places of schemas
        self.references: dict[str, str] = {}  # place -> where it points to
        self.one_ofs: dict[str, list[Any]] = {}
        self.values = 0
        self.deepest = -1  # of the values without a schema that are needed
        # Where schemas are combined, a property that one of them does not declare may be declared by another.
        self.merges = any(map(combines, itertools.islice(every(root), MAX_SCHEMAS + 1)))
        self.patterned = any(map(has_patterns, itertools.islice(every(root), MAX_SCHEMAS + 1)))

    def schema(self, schema: Any, where: str, level: int) -> Any:
        self.seen.add(where)
        if len(self.seen) > MAX_SCHEMAS or level > MAX_LEVELS:
            found = f"more than {MAX_LEVELS} levels" if level > MAX_LEVELS else f"more than {MAX_SCHEMAS} schemas"
            expected = f"at most {MAX_SCHEMAS} schemas in {MAX_LEVELS} levels"
            raise ConfigError("the schema is too large", field=where, found=found, expected=expected)
        if schema is False:
            return False
        if schema is not True and not isinstance(schema, dict):
            raise ConfigError("not a schema", field=where, found=schema, expected="an object, true or false")
        done = {} if schema is True else self._keywords(schema, where, level)
        if not done.keys() - DEFINITIONS:
            return done | self._open()
        about = types(done)
        if about and not {"enum", "const"} & done.keys():
            done["type"] = about if len(about) > 1 else about[0]
            self._bound(done, about, where)
        return done

    def _keywords(self, schema: dict[str, Any], where: str, level: int) -> dict[str, Any]:
        done: dict[str, Any] = {}
        for keyword, value in schema.items():
            place = f"{where}/{_escaped(keyword)}"
            if keyword in KINDS:
                self._check(KINDS[keyword], value, place)
                done[keyword] = self._value(KINDS[keyword], value, place, level)
            elif keyword == "x-guidance":
                _refuse(place, "the grammar's options are not the schema's to set", "leave it out")
            elif not (keyword in _ANNOTATIONS or keyword.startswith("x-") or (keyword == "uniqueItems" and value is False)):
                _refuse(place, f"the keyword {keyword} cannot be enforced")
        if "oneOf" in done:
            if "anyOf" in done:
                _refuse(f"{where}/oneOf", "oneOf beside anyOf cannot be enforced")
            self.one_ofs[f"{where}/oneOf"] = schema["oneOf"]
            done["anyOf"] = done.pop("oneOf")
        if done.get("format") in _FORMATS:
            written = _FORMATS[done.pop("format")]
            if "pattern" in done:
                done["allOf"] = [*done.get("allOf", ()), {"pattern": written}]
            else:
                done["pattern"] = written
        return done

    def _check(self, kind: str, value: Any, place: str) -> None:
        if not _fits(kind, value):
            raise ConfigError("not a valid schema", field=place, found=value, expected=_EXPECTED[kind])
        if kind == "pattern":
            check_pattern(value, place)
        elif kind == "reference":
            self.references[place] = value
        elif kind == "values":
            self.values += len(value)
            if self.values > MAX_VALUES:
                raise ConfigError("too many values in enums", field=place, found=self.values, expected=f"at most {MAX_VALUES}")

    def _value(self, kind: str, value: Any, place: str, level: int) -> Any:
        if kind == "schema":
            return self.schema(value, place, level + 1)
        if kind == "schemas":
            return [self.schema(one, f"{place}/{i}", level + 1) for i, one in enumerate(value)]
        if kind == "map":
            done = {name: self.schema(one, f"{place}/{_escaped(name)}", level + 1) for name, one in value.items()}
            return _names_without_nul(done, place) if place.endswith("/patternProperties") else done
        return without_nul(value) if kind == "pattern" else value

    def check_references(self) -> None:
        """Every reference points to a schema; `oneOf`, which is compiled as `anyOf`, has options that exclude each other."""
        for place, reference in self.references.items():
            if unquote(reference) not in self.seen:
                raise ConfigError("points to no schema", field=place, found=reference, expected="a place inside this schema")
        for place, options in self.one_ofs.items():
            for (i, a), (j, b) in itertools.combinations(enumerate(map(self._resolved, options)), 2):
                if not disjoint(a, b):
                    _refuse(
                        place, f"oneOf cannot be enforced: a value may fit both option {i} and option {j}",
                        "use anyOf, or give each option a required property with a const of its own",
                    )  # fmt: skip

    def _resolved(self, schema: Any) -> Any:
        for _ in range(MAX_LEVELS):
            if not (isinstance(schema, dict) and "$ref" in schema):
                break
            schema = target(self.root, schema["$ref"])
        return schema

    def _bound(self, done: dict[str, Any], about: list[str], where: str) -> None:
        if "string" in about and "maxLength" not in done:
            most = min(self.bounds.string, _FORMAT_LENGTHS.get(done.get("format", ""), self.bounds.string))
            done["maxLength"] = max(most, done.get("minLength", 0), places(done.get("pattern", "")))
        if {"integer", "number"} & set(about):
            self._bound_number(done, whole="number" not in about)
        if "array" in about:
            self._bound_array(done)
        if "object" in about:
            (self._bound_part if self.merges else self._bound_object)(done, where)

    def _bound_number(self, done: dict[str, Any], whole: bool) -> None:
        most = self.bounds.magnitude
        low = max((done[k] for k in ("minimum", "exclusiveMinimum") if k in done), default=-most)
        high = min((done[k] for k in ("maximum", "exclusiveMaximum") if k in done), default=most)
        if low <= -most:
            done["minimum"] = -most if high > -most else math.floor(high) - most
            done.pop("exclusiveMinimum", None)
        if high >= most:
            done["maximum"] = most if low < most else math.ceil(low) + most
            done.pop("exclusiveMaximum", None)
        digits = self.bounds.decimals
        if not whole and "multipleOf" not in done and max(_decimals(low), _decimals(high)) <= digits:
            done["multipleOf"] = float(Decimal(1).scaleb(-digits))

    def _bound_array(self, done: dict[str, Any]) -> None:
        least, first = done.get("minItems", 0), len(done.get("prefixItems", ()))
        if "maxItems" not in done:
            done["maxItems"] = max(self.bounds.items, least)
        if "items" not in done and not self.merges:
            done["items"] = False if first and first >= least else self._any()

    def _bound_object(self, done: dict[str, Any], where: str) -> None:
        declared, least = done.get("properties", {}), done.get("minProperties", 0)
        patterns, rest = "patternProperties" in done, done.get("additionalProperties", True)
        if patterns:
            # Names outside the patterns may be written with escapes, behind which is a name that fits a pattern.
            if rest is not False and not _is_open(rest):
                _refuse(
                    f"{where}/additionalProperties", "a schema beside patternProperties cannot be enforced", "set it to false"
                )
            done["additionalProperties"] = False
        elif "additionalProperties" not in done:
            closed = declared and len(declared) >= least and all(n in declared for n in done.get("required", ()))
            done["additionalProperties"] = False if closed else self._any()
        self._check_count(done, where)
        if patterns or done["additionalProperties"] is False:
            return
        if not declared:
            if "maxProperties" not in done:
                done["maxProperties"] = max(self.bounds.items, least, len(done.get("required", ())))
            done |= self._named(done["additionalProperties"])
        else:  # beside the schemas of declared properties a pattern would bind these too
            done["allOf"] = [*done.get("allOf", ()), self._named(True)]

    def _bound_part(self, done: dict[str, Any], where: str) -> None:
        """An object that may be combined with others stays open, for names that are written without escapes."""
        rest = done.get("additionalProperties", True)
        if rest is not False and self.patterned:
            _refuse(
                f"{where}/{'additionalProperties' if 'additionalProperties' in done else 'properties'}",
                "other properties cannot be left open where schemas are combined and some have patternProperties",
                "set additionalProperties to false, or leave out patternProperties",
            )  # fmt: skip
        self._check_count(done, where)
        if rest is not False:
            done["allOf"] = [*done.get("allOf", ()), self._named({})]

    def _check_count(self, done: dict[str, Any], where: str) -> None:
        if counts_repeats(done):
            _refuse(
                f"{where}/minProperties", "minProperties cannot be enforced for names that are not declared: one may come twice",
                "declare the properties and set additionalProperties to false, or list the required ones",
            )  # fmt: skip

    def _named(self, schema: Any) -> dict[str, Any]:
        """Properties beside the declared ones: their names are bounded, and written without needless escapes."""
        return {"patternProperties": {f"^(?s:.{{0,{self.bounds.name}}})$": schema}, "additionalProperties": False}

    def _any(self) -> dict[str, Any]:
        self.deepest = max(self.deepest, self.bounds.levels - 1)
        return {"$ref": f"#/$defs/{_ANY}{self.bounds.levels - 1}"}

    def _open(self) -> dict[str, Any]:
        """What a schema without constraints becomes. Combined with others it may be any value: these have the bounds."""
        if self.merges:
            return {}
        self.deepest = max(self.deepest, self.bounds.levels - 1)
        return self.any_value(self.bounds.levels)

    def any_value(self, level: int) -> dict[str, Any]:
        """A schema for any value with at most `level` levels of arrays and objects."""
        out: dict[str, Any] = {"type": ["null", "boolean", "number", "string"], "maxLength": self.bounds.string}
        self._bound_number(out, whole=False)
        if level > 0:
            inner = {"$ref": f"#/$defs/{_ANY}{level - 1}"}
            out["type"] = [*out["type"], "array", "object"]
            out |= {"items": inner, "maxItems": self.bounds.items}
            out |= {"maxProperties": self.bounds.items, **self._named(inner)}
        return out


def _fits(kind: str, value: Any) -> bool:
    """Whether a keyword's value is of its kind."""
    if kind == "types":
        return bool(value) and all(one in TYPES for one in (value if isinstance(value, list) else [value]))
    if kind == "reference":
        return isinstance(value, str) and (value == "#" or value.startswith("#/"))
    if kind in ("values", "schemas"):
        return isinstance(value, list) and bool(value)
    if kind == "names":
        return isinstance(value, list) and all(isinstance(name, str) for name in value)
    if kind in ("count", "number"):
        number = isinstance(value, int if kind == "count" else int | float) and not isinstance(value, bool)
        return number and math.isfinite(value) and (kind == "number" or value >= 0)
    expected: dict[str, Any] = {"schema": dict | bool, "map": dict, "text": str, "pattern": str, "value": object}
    return isinstance(value, expected[kind])


def _is_open(schema: Any) -> bool:
    """Whether a schema, checked or as it was given, lets every value through."""
    return schema is True or schema == {} or (isinstance(schema, dict) and sorted(schema.get("type", ())) == _ALL)


def _names_without_nul(patterns: dict[str, Any], place: str) -> dict[str, Any]:
    for pattern in patterns:
        check_pattern(pattern, f"{place}/{_escaped(pattern)}")
    return {without_nul(pattern): schema for pattern, schema in patterns.items()}


def _decimals(number: float) -> int:
    """Digits behind the point."""
    return max(-int(Decimal(str(number)).as_tuple().exponent), 0)


def _refuse(place: str, message: str, fix: str = "leave it out of the schema, and check it when the answer has come") -> None:
    raise ConfigError(message, field=place, fix=fix)


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
