"""The text of a PDF, by PDFium: filled form fields are part of it, and words cut at the end of a line or page are whole."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from tutelage.errors import DataError

CUT = "\ufffe"
SOFT_HYPHEN = re.compile("[\x02\ufffe]\r?\n?")  # how PDFium marks a hyphen at the end of a line
CUT_WORD = re.compile(rf"(\w+){CUT}(?=(\w+))")
WORD = re.compile(r"\w+(?:-\w+)*")
PAGE_END = re.compile(r"(?<=[^\W\d_])-$")  # of a page whose last word goes on


class Pages(NamedTuple):
    """What a PDF holds.

    Example:
        Pages(text="First page.\\n\\nThird page.", page_count=3, pictures=[2])
    """

    text: str
    page_count: int
    pictures: list[int]  # numbers of the pages that hold something, but no text


def read(path: Path) -> Pages:
    """All pages in order. Raises `DataError` for a file that PDFium cannot open, or a page that it cannot read."""
    import pypdfium2

    number = 0
    try:
        pdf = pypdfium2.PdfDocument(path)
        try:
            pdf.init_forms()
            texts, pictures = [], []
            for number in range(1, len(pdf) + 1):
                text, bare = _page(pdf, number - 1)
                texts.append(text)
                if bare:
                    pictures.append(number)
        finally:
            pdf.close()
    except pypdfium2.PdfiumError as error:
        where = f" on page {number}" if number else ""
        fix = "save it again without a password" if "password" in str(error).lower() else "open it in a viewer to check it"
        raise DataError(f"not a readable PDF ({error}{where})", file=path, fix=fix) from error
    return Pages(joined(texts), len(texts), pictures)


def _page(pdf: Any, index: int) -> tuple[str, bool]:
    """The text of a page, and whether it holds something that is not text."""
    import pypdfium2

    page = pdf[index]
    if page.formenv and page.flatten() == pypdfium2.raw.FLATTEN_SUCCESS:  # form fields become text of the page
        page.close()
        page = pdf[index]
    text = page.get_textpage().get_text_range().replace("\r\n", "\n").strip()
    return text, not text and any(True for _ in page.get_objects(max_depth=1))


def joined(pages: list[str]) -> str:
    """The pages with an empty line between them, and none where a word goes on. A hyphen at the end of a line stays where the
    document writes the word with it elsewhere, or where it is no hyphenation (`X-ray`, `Anglo-Saxon`)."""
    text = ""
    for page in pages:
        page = SOFT_HYPHEN.sub(CUT, page)
        if not page:
            continue
        cut = text.endswith(CUT) or PAGE_END.search(text) is not None
        text = text[:-1] + CUT + page if cut and page[0].islower() else f"{text}\n\n{page}" if text else page
    if CUT not in text:
        return text
    known = Counter(word.lower() for word in WORD.findall(text.replace(CUT, " ")))

    def whole(found: re.Match[str]) -> str:
        left, right = found[1], found[2]
        return f"{left}-" if _is_compound(left, right, known) else left

    return CUT_WORD.sub(whole, text).replace(CUT, "-")


def _is_compound(left: str, right: str, known: Counter[str]) -> bool:
    with_hyphen, without = known[f"{left}-{right}".lower()], known[f"{left}{right}".lower()]
    if with_hyphen != without:
        return with_hyphen > without
    return not left.isalpha() or not right[0].islower() or (len(left) == 1 or left[1:].isupper())
