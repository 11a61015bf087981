"""The main text of a web page, by trafilatura, with the blank lines of its code."""

from __future__ import annotations

import re
from typing import Any

from tutelage.data.sources.encodings import decode, text_codec

CHARSET = re.compile(rb"<meta[^>]{0,200}charset=[\"']?([\w-]+)|^\s*<\?xml[^>]{0,200}encoding=[\"']([\w-]+)", re.IGNORECASE)
HEAD_BYTES = 2048
# What the WHATWG's Encoding Standard reads for a name, where Python takes the name at its word
WEB = {
    "ascii": "cp1252", "iso8859-1": "cp1252", "iso8859-9": "cp1254", "iso8859-11": "cp874", "tis-620": "cp874",
    "gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932", "euc_kr": "cp949",
}  # fmt: skip
EMPTY_LINE = "\u2424"  # trafilatura's own mark of one, which it takes out when it has dropped the lines that are really empty


def decoded(data: bytes, file: str, encoding: str) -> str:
    """The page as text: by its byte-order mark, else by the charset that it declares, else by `encoding`. Raises `DataError`."""
    found = CHARSET.search(data[:HEAD_BYTES])
    declared = text_codec((found[1] or found[2]).decode()) if found else None
    if declared is None or b"\0" in " ".encode(declared):  # a declaration read as ASCII is wrong about UTF-16
        return decode(data, file, encoding)
    return decode(data, file, f"{WEB.get(declared, declared)},{encoding}")


def main_text(page: str) -> str:
    """The text of a page without its navigation; "" where trafilatura finds none."""
    import trafilatura

    tree: Any = trafilatura.load_html(page)
    if tree is None:
        return ""
    for block in tree.iter("pre"):
        _mark_empty_lines(block)
    return (trafilatura.extract(tree, include_tables=True, include_comments=False) or "").replace(EMPTY_LINE, "")


def _mark_empty_lines(block: Any) -> None:
    """Writes `EMPTY_LINE` where two line ends follow each other, across the elements of a block of code."""
    ends = True  # whether the text so far ends in a line end

    def marked(text: str) -> str:
        nonlocal ends
        out = []
        for line in text.splitlines(keepends=True):
            out.append(EMPTY_LINE + line if ends and line.strip("\r\n") == "" else line)
            ends = line.endswith("\n")
        return "".join(out)

    def walk(element: Any) -> None:
        nonlocal ends
        if isinstance(element.tag, str) and element.text:
            element.text = marked(element.text)
        for child in element:
            ends = ends or child.tag == "br"
            walk(child)
            if child.tail:
                child.tail = marked(child.tail)

    walk(block)
