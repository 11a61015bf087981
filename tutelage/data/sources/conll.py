"""Sentences of CoNLL files: a token a line, columns between tabs or spaces, a blank line between sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tutelage.data.sources.readers_base import Rejections
from tutelage.data.sources.text_lines import lines, without_end
from tutelage.errors import DataError

TAG = re.compile(r"O|[BI]-.+")
Line = tuple[int, list[str]]  # its number, from 1, and its columns


@dataclass(slots=True)
class Sentence:
    lines: list[Line] = field(default_factory=list)
    broken: bool = False  # a line of it could not be read, and was counted


def sentences(text: str, path: Path, report: Rejections) -> Iterator[tuple[int, list[str], list[str]]]:
    """(line, tokens, tags). The token is the first column, or the second where the first counts the tokens; the tag is the last.

    Raises `DataError` where it is not clear which column holds the tags.
    """
    found = list(_sentences(text, path, report))
    whole = [s for s in found if not s.broken]
    token, tag = _columns(whole, path)
    for sentence in whole:
        report.seen += 1
        yield sentence.lines[0][0], [c[token] for _, c in sentence.lines], [c[tag] for _, c in sentence.lines]


def _sentences(text: str, path: Path, report: Rejections) -> Iterator[Sentence]:
    rows = [_split(without_end(line)) for line in [*lines(text), ""]]
    width = next((len(row) for row in rows if row and row[0] != "-DOCSTART-" and not row[0].startswith("#")), 2)
    current = Sentence()
    for number, columns in enumerate(rows, 1):
        if not columns or columns[0] == "-DOCSTART-":
            if current.lines or current.broken:
                yield current
            current = Sentence()
        elif columns[0].startswith("#") and (len(columns) != width or not TAG.fullmatch(columns[-1])):
            continue  # a comment, not a token that is "#"
        elif len(columns) == 1:
            report.seen += 1
            current.broken = True
            wrong = DataError("a token without a tag", file=path, line=number, found=columns[0], expected="TOKEN … TAG")
            report.broken(wrong, source=f"{path}#{number}", excerpt=columns[0])
        else:
            current.lines.append((number, columns))


def _split(line: str) -> list[str]:
    """Columns between tabs where there are any, else between spaces; other white space is part of a token."""
    if "\t" in line:
        return [column.strip(" ") for column in line.strip("\t ").split("\t")]
    return [column for column in line.split(" ") if column]


def _columns(found: list[Sentence], path: Path) -> tuple[int, int]:
    """Where tokens and tags stand."""
    if not found or not all(_counted(s) for s in found):
        return 0, -1
    width = {len(columns) for s in found for _, columns in s.lines}
    if len(width) > 1:
        raise DataError(
            "lines with a different number of columns", file=path, found=sorted(width), expected="as many in every line",
            fix="fix the file, or keep two columns: the token and its tag",
        )  # fmt: skip
    tagged = [
        c for c in range(2, *width)
        if all(TAG.fullmatch(columns[c]) for s in found for _, columns in s.lines)
        and any(columns[c] != "O" for s in found for _, columns in s.lines)
    ]  # fmt: skip
    if len(tagged) > 1:
        raise DataError(
            "several columns hold tags", file=path, found=f"columns {', '.join(str(c + 1) for c in tagged)}", expected="one",
            fix=f"keep the token and the tag that you want, such as: cut -f 2,{tagged[0] + 1} {path}",
        )  # fmt: skip
    return 1, tagged[0] if tagged else -1


def _counted(sentence: Sentence) -> bool:
    """Whether the first column counts the tokens of the sentence, in a file that has more than these."""
    firsts = [columns[0] for _, columns in sentence.lines]
    wide = all(len(columns) > 2 for _, columns in sentence.lines)
    return wide and any(firsts == [str(i + start) for i in range(len(firsts))] for start in (0, 1))
