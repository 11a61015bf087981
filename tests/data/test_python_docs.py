"""python-docs: real text from every Python, read without running any of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tutelage.data.clean.filters import clean
from tutelage.data.demo import python_docs
from tutelage.errors import DataError
from tutelage.records import Document


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return list(python_docs.documents())


def test_there_is_enough_text_and_it_is_documentation(documents: list[Document]) -> None:
    """The embedded recipe stands on about 2 MB; a parser that loses methods or topics leaves a quarter of that."""
    by_source = {d.source: d.text for d in documents}
    assert len(by_source) == len(documents), "two documents of one name"
    assert sum(map(len, by_source.values())) > 1_500_000
    assert sum(1 for source in by_source if source.startswith("python-docs:topics/")) > 60
    assert "os.path.join(a, *p)\n    Join two or more pathname components" in by_source["python-docs:os.path"]
    assert "class textwrap.TextWrapper(width=70" in by_source["python-docs:textwrap"]
    assert "\n    TextWrapper.wrap(text)\n" in by_source["python-docs:textwrap"]
    assert by_source["python-docs:topics/assert"].startswith('The "assert" statement\n\nAssert statements')


def test_texts_are_clean_so_that_ids_survive_collecting(documents: list[Document]) -> None:
    """Questions name their document by id: if cleaning changed the text, no question would find its parent."""
    assert all(clean(d.text) == d.text for d in documents)
    assert all(d.licence == "PSF-2.0" for d in documents)


def test_nothing_is_imported_or_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing a library to read its docstrings runs it: antigravity opens a browser."""
    (tmp_path / "module.py").write_text(
        '"""A module that must not run."""\nraise SystemExit(1)\ndef f(a: int = 1, *, b=2) -> int:\n    """Say what f does."""\n'
        'class C:\n    """A class."""\n    def __init__(self, x): pass\n    @staticmethod\n    def s(y):\n        """Static."""\n'
        '    def m(self, z=0):\n        """Method."""\n'
    )
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "hidden.py").write_text('"""A test that documents nothing for users."""\n')
    monkeypatch.setattr(python_docs, "stdlib", lambda: tmp_path)
    (document,) = python_docs.documents()
    assert "module" not in sys.modules
    assert document.text == (
        "module\n\nA module that must not run.\n\nmodule.f(a=1, *, b=2)\n    Say what f does.\n\n"
        "class module.C(x)\n    A class.\n\n"
        "    C.s(y)\n        Static.\n\n    C.m(z=0)\n        Method."
    )


def test_a_python_without_sources_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embedded Pythons ship a zip of compiled files: an empty corpus would train a model of nothing."""
    monkeypatch.setattr(python_docs, "stdlib", lambda: tmp_path)
    with pytest.raises(DataError, match=r"no \.py files"):
        list(python_docs.documents())


def test_digest_follows_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a Python update a cached corpus must not be taken for the new one."""
    (tmp_path / "a.py").write_text('"""One."""')
    monkeypatch.setattr(python_docs, "stdlib", lambda: tmp_path)
    before = python_docs.digest()
    assert before == python_docs.digest()
    (tmp_path / "a.py").write_text('"""Two."""')
    assert before != python_docs.digest()
