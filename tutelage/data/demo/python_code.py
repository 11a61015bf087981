"""`python-code:?modules=150`: the standard library's own program text, one document a module, without comments and docstrings.

So none of it is in `python-docs:`, which is made of the docstrings: one is a field to adapt to, the other what was known before.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator, Mapping

from tutelage.data.demo.python_docs import LICENCE, module_name, source_files, stdlib
from tutelage.errors import ConfigError
from tutelage.records import Document

LEAST = 200  # characters: a module that only imports another one has nothing to learn from


def documents(parameters: Mapping[str, str]) -> Iterator[Document]:
    """Modules in order of their files, `modules` of them (all) evenly spread. Nothing is imported or executed. Raises
    `ConfigError` for an unknown or senseless parameter."""
    root, files = stdlib(), source_files()
    asked = dict(parameters)
    count = asked.pop("modules", str(len(files)))
    if asked or not count.isdecimal() or not int(count):
        found = next(iter(asked), f"modules={count}")
        raise ConfigError("unknown parameter of python-code:", found=found, expected="modules, 1 or more")
    most = min(int(count), len(files))
    for path in (files[i * len(files) // most] for i in range(most)):
        text = code(path.read_bytes())
        if len(text) >= LEAST:
            name = module_name(path.relative_to(root))
            yield Document.make(text, source=f"python-code:{name}", licence=LICENCE, meta={"title": name})


def code(source: bytes) -> str:
    """The statements of a module, spelt by `ast`; empty for what this Python cannot parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old sources
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""  # a template or a deliberately broken file
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
            node.body[:1] = [] if len(node.body) > 1 or isinstance(node, ast.Module) else [ast.Pass()]
    return ast.unparse(tree)
