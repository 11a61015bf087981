"""The source files that a stage's mechanism is made of: an edit there makes the stage run again, one elsewhere does not."""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

from tutelage.files import file_digest

PACKAGE = Path(__file__).parent.parent
# Modules that cannot change what a stage makes: messages, folders, measurements of the machine; and the sections, whose
# values are in the digest themselves.
OUTSIDE_DIGEST = {
    f"tutelage.{name}"
    for name in (
        "errors",
        "files",
        "digests",
        "aside",
        "log",
        "recipe",
        "rundir",
        "cli",
        "api",
        "stages",
        "plan",
        "plan.machine",
        "plan.time",
        "plan.memory",
        "plan.energy",
        "config",
        "config.base",
        "config.stages",
        "config.train",
        "config.feedback",
        "config.spec",
        "references",
    )
}
DATA_FILES = (".cpp", ".h", ".jinja", ".yaml", ".json", ".txt")


@functools.cache
def code_digest(module: str) -> str:
    """SHA-256 over the sources of every module of this package that `module` imports, and the data files that they name."""
    total = hashlib.sha256()
    for path in code_files(module):
        total.update(f"{path.relative_to(PACKAGE).as_posix()}\0{file_digest(path)}\n".encode())
    return total.hexdigest()


def code_files(module: str) -> list[Path]:
    """The files that `code_digest` covers, in order."""
    found: set[Path] = set()
    for name in _reach(module):
        path = _path(name)
        assert path is not None
        found |= {path, *_data_files(path)}
    return sorted(found)


def _data_files(path: Path) -> Iterator[Path]:
    """Data files beside a module that it names in a string, alone or by their folder."""
    named = {n.value for n in ast.walk(_tree(path)) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    for item in path.parent.iterdir():
        if item.name not in named:
            continue
        for file in item.rglob("*") if item.is_dir() and not (item / "__init__.py").exists() else (item,):
            if file.suffix in DATA_FILES:
                yield file


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _path(module: str) -> Path | None:
    base = PACKAGE.parent.joinpath(*module.split("."))
    for candidate in (base.with_suffix(".py"), base / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def _reach(module: str) -> set[str]:
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in seen or name in OUTSIDE_DIGEST:
            continue
        path = _path(name)
        if path is None:
            continue
        seen.add(name)
        waiting += _imports(path)
        waiting += [name.rpartition(".")[0]] if "." in name else []
    return seen - {"tutelage"}


def _imports(path: Path) -> list[str]:
    """Modules of this package that a file imports anywhere, or names in a string such as `tutelage.x.y`."""
    out = []
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            out += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            out += [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("tutelage."):
            out.append(node.value)
    return [m for m in out if m.startswith("tutelage")]
