"""Sections, and the errors for a wrong key or value."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator
from pydantic import Field as _PydanticField
from pydantic.fields import FieldInfo

from tutelage.errors import ConfigError, Setting, UserError
from tutelage.unicode import HALF, half_character

# A single name is a list of one: --set corpus.sources=docs/
Names = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]


class Section(BaseModel):
    """A group of settings. Frozen; an unknown key is an error with the nearest name."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), coerce_numbers_to_str=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _completed(cls, values: Any) -> Any:
        """Unset keys of a nested section fall back to this field's default, which may differ from the section's own."""
        if not isinstance(values, Mapping):
            return values
        defaults = {n: f.default for n, f in cls.model_fields.items() if isinstance(f.default, Section)}
        return {
            n: {**defaults[n].model_dump(), **v} if n in defaults and isinstance(v, Mapping) else v for n, v in values.items()
        }


S = TypeVar("S", bound=Section)


def setting(default: Any, text: str, *, identity: bool = True, **rest: Any) -> Any:
    """A field with its help text. `identity=False`: it cannot change the result, so it stays out of the digest."""
    return _PydanticField(default, description=text, json_schema_extra={"identity": identity}, **rest)


def artifact(text: str, *, kind: str, default: Any = ...) -> Any:
    """A field that names an input: a run, a folder, or `$stage` in a recipe. Its content enters the digest, not its path."""
    return _PydanticField(default, description=text, json_schema_extra={"identity": False, "artifact": kind})


def extra_of(field: FieldInfo) -> dict[str, Any]:
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def artifacts_of(section: type[Section]) -> dict[str, str]:
    """Names of the input fields and the kind of artifact that each takes."""
    return {n: str(extra_of(f)["artifact"]) for n, f in section.model_fields.items() if "artifact" in extra_of(f)}


def identity_of(config: Section) -> dict[str, Any]:
    """The settings that can change a result: what a digest covers."""
    out: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        if extra_of(field).get("identity", True):
            value = getattr(config, name)
            out[name] = identity_of(value) if isinstance(value, Section) else value
    return out


def subsection(field: FieldInfo) -> type[Section] | None:
    """The section class of a nested field, if it is one."""
    for candidate in (field.annotation, *get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def known_keys(section: type[Section], prefix: str = "") -> Iterator[str]:
    """Every dotted key below a section."""
    for name, field in section.model_fields.items():
        yield prefix + name
        inner = subsection(field)
        if inner is not None:
            yield from known_keys(inner, f"{prefix}{name}.")


def nearest(name: str, names: list[str]) -> str | None:
    """The known name that is most like `name`; for a dotted key the last part counts too."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return close[0]
    tails = [n for n in names if n.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    return tails[0] if tails else None


@dataclasses.dataclass(slots=True)
class SourceLocations:
    """Where each dotted key of a recipe was written: on a line of its file, or in a `--set`."""

    file: Path | None = None
    lines: dict[str, int] = dataclasses.field(default_factory=dict)
    typed: dict[str, str] = dataclasses.field(default_factory=dict)  # key: the words of the command line

    def of(self, *keys: str) -> dict[str, Any]:
        """`file` and `line` for an error about the first of `keys` whose place is known."""
        for key in keys:
            if key in self.typed:
                return {"file": self.typed[key]}
            if key in self.lines:
                return {"file": self.file, "line": self.lines[key]}
        return {"file": self.file}

    def replace(self, key: str, where: int | str) -> None:
        """Sets the place of `key`, and of everything below it, to a line or a `--set`."""
        for known in (self.lines, self.typed):
            for old in [k for k in known if k == key or k.startswith(f"{key}.")]:
                del known[old]  # type: ignore[attr-defined]
        if isinstance(where, int):
            self.lines[key] = where
        else:
            self.typed[key] = where


RENAMED = {"silent": "zero_variance"}  # former key -> the key that an error about it suggests


def build(section: type[S], values: Mapping[str, Any], *, places: SourceLocations | None = None, prefix: str = "") -> S:
    """The section of a mapping. Raises `ConfigError` that names the key, its place and the nearest known key."""
    if at := half_character(dict(values)):
        keys = [prefix + at.partition("[")[0], prefix.rstrip(".")]
        fix = "write valid Unicode; of a file whose name is not UTF-8, name the folder or a pattern that fits it"
        raise ConfigError(HALF, field=prefix + at, expected="valid Unicode", fix=fix, **(places or SourceLocations()).of(*keys))
    try:
        return section.model_validate(dict(values))
    except ConfigError as error:  # of fields that do not go together
        if error.file is not None:
            raise
        raise located(error, places or SourceLocations(), prefix.rstrip(".")) from None
    except ValidationError as error:
        first = error.errors()[0]
        path = _known_part(section, first)
        key = ".".join(path)
        tried = [prefix + ".".join(path[:n]) for n in range(len(path), 0, -1)]
        tried += [prefix.rstrip(".")] if first["type"] == "missing" else []
        where = {**(places or SourceLocations()).of(*tried), "field": prefix + key}
        if first["type"] == "extra_forbidden":
            names = list(known_keys(section))
            siblings = [n for n in names if n.rpartition(".")[0] == ".".join(path[:-1])]
            renamed = RENAMED.get(path[-1])
            hint = renamed if renamed in siblings else nearest(key, siblings) or nearest(key, names)
            raise ConfigError(
                f"unknown key `{key}`",
                **where,
                expected=f"one of: {', '.join(n.rsplit('.', 1)[-1] for n in siblings)}",
                fix=f"did you mean `{hint}`?" if hint else None,
            ) from None
        if first["type"] == "missing":
            raise ConfigError(f"`{key}` is required", **where, expected=_describe(section, path)) from None
        # A value with several allowed types gets one complaint per type.
        wrong = [e["msg"] for e in error.errors() if _known_part(section, e) == path]
        expected = _describe(section, path)
        raise ConfigError(
            f"`{key}` has a value that does not fit: {', or '.join(dict.fromkeys(wrong))}",
            **where,
            found=first.get("input"),
            expected=expected,
            fix=_choice(first, key),
        ) from None


SWITCHED = {True: ("on", "true", "yes", "always"), False: ("off", "false", "none", "no", "never")}


def _choice(error: Any, key: str) -> str | None:
    """What to write instead of a word that the setting does not take."""
    if error["type"] not in ("literal_error", "enum"):
        return None
    said = str(error["ctx"]["expected"])
    words = re.findall(r"'([^']*)'", said) or re.split(r", | or ", said)
    found = error.get("input")
    switch = {"true": True, "yes": True, "false": False, "no": False}.get(str(found).lower())
    meant = next((w for w in words if switch is not None and w in SWITCHED[switch]), None)
    near = meant or next(iter(difflib.get_close_matches(str(found).lower(), words, n=1, cutoff=0.6)), None)
    return f"did you mean {Setting(key, near)}?" if near else f"set {key} to one of: {', '.join(words)}"


E = TypeVar("E", bound=UserError)


def located(error: E, places: SourceLocations, prefix: str) -> E:
    """The error with the section's name before its field, and the place of that field or of the nearest key around it."""
    key = ".".join(filter(None, (prefix, error.field)))
    parts = key.split(".")
    return error.but(field=key or None, **places.of(*(".".join(parts[:n]) for n in range(len(parts), 0, -1))))


def _known_part(section: type[Section], error: Any) -> list[str]:
    """The dotted key of a complaint, without the names that pydantic gives to the types of a union."""
    out: list[str] = []
    current: type[Section] | None = section
    for part in error["loc"]:
        if current is not None:
            out.append(str(part))
            current = subsection(current.model_fields[part]) if part in current.model_fields else None
        elif isinstance(part, int):
            out.append(str(part))
    return out


def _describe(section: type[Section], path: list[str]) -> str | None:
    current: type[Section] | None = section
    text = None
    for part in path:
        if current is None or part not in current.model_fields:
            break
        field = current.model_fields[part]
        text, current = field.description, subsection(field)
    return text


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain values: `on`, `no`, `12:30`, `007` and dates are text, `1e-3` is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Keys are text, as `Places` has them: a stage named 1 is "1"."""
        self.flatten_mapping(node)
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+", "-+.0123456789"),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


MOST_NODES = 100_000  # of a recipe, each as often as aliases repeat it


def _read_yaml(text: str, file: Path | None = None) -> tuple[yaml.Node | None, Any]:
    """The nodes and the value of a YAML text. Raises `ConfigError` for one that is nested too deeply, holds itself, or grows by
    its aliases, and `YAMLError` for what is no YAML."""
    fix = "write the values out, without anchors (&name) and aliases (*name)"
    try:
        node = yaml.compose(text, Loader=_Loader)
        for count, (inner, above) in enumerate(_nodes(node)):
            place: dict[str, Any] = {"file": file, "line": inner.start_mark.line + 1 if file else None}
            if inner in above:
                raise ConfigError("this YAML value holds itself", **place, found=None if file else text, fix=fix)
            if count > MOST_NODES:
                raise ConfigError(f"this YAML has more than {MOST_NODES:,} values, by its aliases", **place, fix=fix)
        return node, yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise ConfigError(
            "this YAML is nested too deeply", file=file, found=None if file else text, fix="settings need a few levels at most"
        ) from None


def _nodes(root: yaml.Node | None) -> Iterator[tuple[yaml.Node, list[yaml.Node]]]:
    """Every node with those that it is in, as often as an alias repeats it."""
    waiting: list[tuple[yaml.Node, list[yaml.Node]]] = [] if root is None else [(root, [])]
    while waiting:
        node, above = waiting.pop()
        yield node, above
        if isinstance(node, yaml.MappingNode):
            waiting += [(inner, [*above, node]) for pair in node.value for inner in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(inner, [*above, node]) for inner in node.value]


def parse_value(text: str) -> Any:
    """The value of `--key value` or `--set a.b=value`, read as YAML: 3, 1e-3, true, [a, b], {a: b}, word."""
    try:
        value = _read_yaml(text)[1]
    except yaml.YAMLError:
        return text
    if isinstance(value, dict) and not text.lstrip().startswith("{"):
        return text  # `python-docs:` is a source, not a mapping
    return text if value is None and text.lower() not in ("null", "~", "none", "") else value


def assign(values: dict[str, Any], key: str, value: Any) -> None:
    """Sets the dotted key in a nested mapping, making the levels it needs."""
    *parents, last = key.split(".")
    for part in parents:
        inner = values.get(part)
        if not isinstance(inner, dict):
            inner = {}
            values[part] = inner
        values = inner
    values[last] = value


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping by dotted keys."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out


def parse_set(text: str) -> tuple[str, Any]:
    """`a.b=c` as a key and a value."""
    key, sep, value = text.partition("=")
    if not sep or not key.strip():
        raise ConfigError("a setting needs the form key=value", found=text, fix="for example --set optimizer.lr=1e-3")
    return key.strip(), parse_value(value.strip())


def load_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The mapping in a YAML file and the line of each dotted key. Raises `ConfigError`."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot read it: {error.strerror}"
        near = Path("recipes") / f"{path.stem}.yaml"
        fix = f"did you mean {near}?" if near.exists() else "give the path of a YAML recipe"
        raise ConfigError(reason, file=path, fix=fix) from None
    except UnicodeDecodeError:
        raise ConfigError("not UTF-8 text", file=path, fix="give the path of a YAML recipe") from None
    try:
        node, values = _read_yaml(text, path)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise ConfigError(
            f"not valid YAML: {getattr(error, 'problem', error)}", file=path, line=mark.line + 1 if mark else None
        ) from None
    if not isinstance(values, dict) or not isinstance(node, yaml.MappingNode):
        raise ConfigError("a recipe is a mapping of keys", file=path, found=values)
    lines: dict[str, int] = {}
    _collect_lines(node, "", lines, path)
    if at := half_character(values):
        key = at.partition("[")[0]
        raise ConfigError(HALF, file=path, line=lines.get(key), field=at, expected="valid Unicode", fix="write valid Unicode")
    return values, lines


def _collect_lines(node: yaml.MappingNode, prefix: str, lines: dict[str, int], path: Path) -> None:
    for key, value in node.value:
        name = prefix + str(key.value)
        if name in lines:
            raise ConfigError(
                f"`{name}` appears twice", file=path, line=key.start_mark.line + 1, fix=f"the first is on line {lines[name]}"
            )
        lines[name] = key.start_mark.line + 1
        if isinstance(value, yaml.MappingNode):
            _collect_lines(value, name + ".", lines, path)
