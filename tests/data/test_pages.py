"""PDF and HTML: everything that a reader of the page would see is in the text, as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tutelage.data.sources import html_text, pdf_text
from tutelage.data.sources.readers import Rejections, read
from tutelage.errors import DataError
from tutelage.records import Document


def test_filled_form_fields_are_text(tmp_path: Path) -> None:
    """The labels of a form without what was filled in, and no word of it."""
    pytest.importorskip("pypdfium2")
    canvas = pytest.importorskip("reportlab.pdfgen.canvas")
    page = canvas.Canvas(str(tmp_path / "a.pdf"), pageCompression=0)
    page.drawString(72, 730, "Name of the applicant:")
    page.acroForm.textfield(name="name", value="Odette Marlow", x=230, y=722, width=200, height=20)
    page.acroForm.choice(name="colour", value="Red", options=["Red", "Blue"], x=230, y=600, width=100, height=20)
    page.save()
    text = pdf_text.read(tmp_path / "a.pdf").text
    assert "Name of the applicant:" in text and "Odette Marlow" in text and "Red" in text and "Blue" not in text
    bare = re.sub(rb"/AP(?=[\s<])", b"/XP", (tmp_path / "a.pdf").read_bytes())  # filled by a tool that draws nothing
    (tmp_path / "b.pdf").write_bytes(bare)
    assert "Odette Marlow" in pdf_text.read(tmp_path / "b.pdf").text


def test_a_page_that_is_a_picture_is_named(tmp_path: Path) -> None:
    """Half of a scanned book is left out silently where the other half has text."""
    pytest.importorskip("pypdfium2")
    canvas = pytest.importorskip("reportlab.pdfgen.canvas")
    page = canvas.Canvas(str(tmp_path / "a.pdf"))
    page.drawString(72, 700, "Words of page 1.")
    page.showPage()
    page.rect(72, 72, 300, 300, fill=1)
    page.showPage()
    page.showPage()  # blank: nothing is lost
    page.save()
    report = Rejections()
    (document,) = read(str(tmp_path / "a.pdf"), report=report)
    assert isinstance(document, Document) and document.text == "Words of page 1."
    ((reason, place),) = report.first.items()
    assert "a page of a PDF without text" in reason and place == f"{tmp_path / 'a.pdf'}" and report.reasons[reason] == 1


def test_words_cut_at_the_end_of_lines_and_pages() -> None:
    """`wellknown`, `Xray`: every hyphen at a line end went; and a word that goes on overleaf stayed in two."""
    cut = "\ufffe"
    pages = [
        f"It is well-known that mem{cut}bers of a well{cut}known club have an X{cut}ray, Anglo{cut}Saxon names\n"
        "from 1910-\n1912, many mem-",
        f"bers more, all well{cut}",
        "known.",
        "A new page.",
    ]
    assert pdf_text.joined(pages) == (
        "It is well-known that members of a well-known club have an X-ray, Anglo-Saxon names\n"
        "from 1910-\n1912, many members more, all well-known.\n\nA new page."
    )
    assert pdf_text.joined(["a dash -", "more"]) == "a dash -\n\nmore" and pdf_text.joined([f"end{cut}", "New"]) == "end-\n\nNew"


def test_a_broken_object_of_a_pdf_is_an_error_of_the_file(tmp_path: Path) -> None:
    """A traceback where the file opens and one of its pages does not."""
    pytest.importorskip("pypdfium2")
    canvas = pytest.importorskip("reportlab.pdfgen.canvas")
    page = canvas.Canvas(str(tmp_path / "a.pdf"), pageCompression=0)
    page.drawString(72, 700, "Words.")
    page.save()
    data = (tmp_path / "a.pdf").read_bytes()
    (tmp_path / "a.pdf").write_bytes(re.sub(rb"/Kids \[ \d+", lambda m: b"/Kids [ 9".ljust(len(m[0])), data))
    with pytest.raises(DataError, match=r"a\.pdf: not a readable PDF"):
        list(read(str(tmp_path / "a.pdf")))


def test_code_of_a_page_keeps_its_blank_lines() -> None:
    """Functions that stick together teach a model of documentation to write them so. Highlighters put line ends into elements."""
    pytest.importorskip("trafilatura")
    words = "".join(f"<p>Paragraph {i} of the page is long enough to be taken for its text.</p>" for i in range(4))
    code = "<pre><code>def a():\n    x = 1\n\n    return x\n\n\ndef b():\n    pass\n</code></pre>"
    marked = "<pre><span>import os</span>\n<span></span>\n<span>print</span>(os)\n</pre>"
    text = html_text.main_text(f"<html><body><article>{words}{code}{words}{marked}{words}</article></body></html>")
    assert "def a():\n    x = 1\n\n    return x\n\n\ndef b():\n    pass\n" in text and "import os\n\nprint(os)" in text
    assert "text.\nParagraph" in text and "\u2424" not in text
