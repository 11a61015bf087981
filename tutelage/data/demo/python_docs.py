"""`python-docs:`: real English text that every Python installation holds.

The language reference (`pydoc_data/topics.py`, one document per topic) and the docstrings of the standard library
(one document per module). Everything is parsed with `ast`; no module is imported, nothing is executed.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tutelage.errors import DataError
from tutelage.records import Document

LICENCE = "PSF-2.0"
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3", "idlelib", "turtledemo",
            "pydoc_data", "_vendor", "msilib", "ensurepip", "config"}  # fmt: skip
# Modules whose documented name is another one: the text reads as the reader knows it.
PUBLIC_NAMES = {"posixpath": "os.path", "_pyio": "io", "_pydecimal": "decimal", "_pydatetime": "datetime",
                "_collections_abc": "collections.abc", "_pylong": "int", "_py_abc": "abc", "_weakrefset": "weakref"}  # fmt: skip
NOISE = re.compile(r"^\s*(?:[-*#=~_]{8,}|\$\w+:?.*\$|# ?-\*- .* -\*-.*|(?:#\s*)?(?:vim?|Local [Vv]ariables):.*)\s*$")
UNDERLINE = re.compile(r"^(\s*)([*=\-~^\"'#])\2{3,}\s*$")


@dataclass(slots=True, frozen=True)
class Entry:
    """One documented function, class or method."""

    module: str  # documented name, as in os.path
    name: str  # inside the module: join, or TextWrapper.wrap
    kind: str  # function | class | method
    signature: str  # join(a, *p), without self
    doc: str  # dedented docstring

    @property
    def full_name(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, frozen=True)
class Module:
    """A parsed module: its docstring, its entries in source order, and what it exports."""

    name: str
    doc: str
    entries: tuple[Entry, ...]
    exported: frozenset[str] | None  # __all__, where it is a literal


def documents() -> Iterator[Document]:
    """Topics of the language reference, then modules of the standard library, both in name order."""
    for name, text in topics().items():
        yield Document.make(text, source=f"python-docs:topics/{name}", licence=LICENCE, meta={"title": name})
    for module in modules():
        text = render(module)
        if text:
            yield module_document(module, text)


def module_document(module: Module, text: str | None = None) -> Document:
    """The document of one module, as `documents` yields it."""
    text = render(module) if text is None else text
    return Document.make(text, source=f"python-docs:{module.name}", licence=LICENCE, meta={"title": module.name})


def topics() -> dict[str, str]:
    """Text of each topic of the language reference; empty where this Python came without `pydoc_data`."""
    path = stdlib() / "pydoc_data" / "topics.py"
    if not path.is_file():
        return {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            found: dict[str, str] = ast.literal_eval(node.value)
            return {name: tidy(_without_underlines(text)) for name, text in sorted(found.items())}
    return {}


def modules() -> tuple[Module, ...]:
    """Every module of the standard library that is written in Python, in order of documented name.

    Files of one documented name (decimal.py and _pydecimal.py) are one module.
    """
    return _modules(stdlib())


@functools.lru_cache(maxsize=2)
def _modules(root: Path) -> tuple[Module, ...]:
    parsed: dict[str, Module] = {}
    paths = source_files()
    if not paths:
        raise DataError("this Python's standard library has no .py files", file=root,
                        fix="use a Python that comes with sources (python.org, a Linux distribution, conda)")  # fmt: skip
    for path in paths:
        name = module_name(path.relative_to(root))
        module = _parse(path, name)
        if module is not None:
            parsed[name] = _joined(parsed[name], module) if name in parsed else module
    return tuple(parsed[name] for name in sorted(parsed))


def _joined(a: Module, b: Module) -> Module:
    """One module of two files: nothing of `a` is said again by `b`."""
    known = {e.name for e in a.entries}
    doc = a.doc if b.doc in a.doc else b.doc if a.doc in b.doc else f"{a.doc}\n\n{b.doc}"
    entries = (*a.entries, *(e for e in b.entries if e.name not in known))
    exported = a.exported | b.exported if a.exported is not None and b.exported is not None else a.exported or b.exported
    return Module(a.name, doc, entries, exported)


def source_files() -> list[Path]:
    """The .py files below the standard library that are read, in path order."""
    root = stdlib()
    return sorted(p for p in root.rglob("*.py") if not _left_out(p.relative_to(root)))


def digest() -> str:
    """64 hex digits over the contents of everything that is read."""
    total = hashlib.sha256()
    root = stdlib()
    for path in [*source_files(), root / "pydoc_data" / "topics.py"]:
        if path.is_file():
            total.update(f"{path.relative_to(root).as_posix()}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def module_name(relative: Path) -> str:
    """Documented name of a file: `os.path` for posixpath.py, `json` for json/__init__.py."""
    parts = [*relative.parts[:-1], relative.stem]
    if parts[-1] == "__init__":
        parts.pop()
    return PUBLIC_NAMES.get(".".join(parts), ".".join(parts))


def render(module: Module) -> str:
    """The module as a page of documentation; empty if it documents nothing worth reading."""
    blocks = [module.name, module.doc] if module.doc else [module.name]
    for entry in module.entries:
        head = f"class {entry.full_name}" if entry.kind == "class" else entry.full_name
        arguments = entry.signature[entry.signature.index("(") :] if "(" in entry.signature else ""
        indent = "    " if entry.kind != "method" else "        "
        lead = "" if entry.kind != "method" else "    "
        body = "\n".join(indent + line if line else "" for line in entry.doc.split("\n"))
        name = head if entry.kind != "method" else entry.name
        blocks.append(f"{lead}{name}{arguments}\n{body}")
    text = tidy("\n\n".join(blocks))
    return text if len(text) >= 80 else ""


def tidy(text: str) -> str:
    """Text without coding lines, rulers and trailing spaces, at most one blank line in a row."""
    lines = [line.expandtabs(8).rstrip() for line in text.replace("\r\n", "\n").replace("\f", "\n").split("\n")]
    kept = "\n".join(line for line in lines if not NOISE.match(line))
    return re.sub(r"\n{3,}", "\n\n", kept).strip("\n")


def _without_underlines(text: str) -> str:
    """A topic's headings are underlined with stars and equal signs: marks without meaning in plain text."""
    return "\n".join(line for line in text.split("\n") if not UNDERLINE.match(line))


def stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _left_out(relative: Path) -> bool:
    folders = relative.parts[:-1]
    return any(p in LEFT_OUT or p.startswith("config-") for p in folders) or relative.stem.startswith(("_sysconfigdata", "test_"))


def _parse(path: Path, name: str) -> Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old sources
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return None  # a template or a deliberately broken file: it documents nothing
    entries: list[Entry] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            entries += _function(node, name)
        elif isinstance(node, ast.ClassDef):
            entries += _class(node, name)
    doc = _doc(tree)
    return Module(name, doc, tuple(entries), _exported(tree)) if doc or entries else None


def _class(node: ast.ClassDef, module: str) -> list[Entry]:
    methods: list[Entry] = []
    init = ""
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            methods += _function(child, module, owner=node.name)
            if child.name == "__init__":
                init = _arguments(child, drop_first=True)
    doc = _doc(node)
    if not doc and not methods:
        return []
    return [Entry(module, node.name, "class", f"{node.name}({init})" if init else node.name, doc), *methods]


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, module: str, owner: str = "") -> list[Entry]:
    doc = _doc(node)
    if not doc:
        return []
    static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
    arguments = _arguments(node, drop_first=bool(owner) and not static)
    kind = "method" if owner else "function"
    return [Entry(module, f"{owner}.{node.name}" if owner else node.name, kind, f"{node.name}({arguments})", doc)]


def _arguments(node: ast.FunctionDef | ast.AsyncFunctionDef, *, drop_first: bool) -> str:
    """Arguments as documentation writes them: no annotations, no self."""
    given = node.args
    for each in [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]:
        if each is not None:
            each.annotation = None
    if drop_first:
        first = given.posonlyargs or given.args
        if first:
            first.pop(0)
        if len(given.defaults) > len(given.args) + len(given.posonlyargs):
            given.defaults.pop(0)
    return ast.unparse(given)


def _doc(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    raw = ast.get_docstring(node, clean=False)
    return tidy(inspect.cleandoc(raw)) if raw else ""


def _exported(tree: ast.Module) -> frozenset[str] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            try:
                return frozenset(ast.literal_eval(node.value))
            except (ValueError, TypeError):
                return None
    return None
