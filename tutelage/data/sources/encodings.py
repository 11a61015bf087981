"""Bytes of a file -> text: byte-order marks, the encodings that the user named, and which one may fit where none does."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator
from functools import cache
from typing import IO, Any

from tutelage.errors import ConfigError, DataError, Setting

# The marks of UTF-32 come first: one of them begins with that of UTF-16.
BOMS = (
    (b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe\0\0", "utf-32"), (b"\0\0\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"),
)  # fmt: skip
NO_CHARSETS = {"undefined", "idna", "punycode", "unicode-escape", "raw-unicode-escape", "mbcs", "oem"}  # of Python's codecs
C1 = bytes(range(0x80, 0xA0))  # control characters in ISO 8859, printed characters in Windows' code pages
CONTROLS = re.compile(b"[\x80-\x9f]")
BLOCK = 1 << 20
LINE_BYTES = 64 << 20  # a longer line of a table is refused: it would take its memory many times over
SHOWN = 24  # bytes either side of the first that does not fit


def text_codec(name: str) -> str | None:
    """Python's name of an encoding of text; None for a name that means none."""
    try:
        b" ".decode(name, "replace")
        found = codecs.lookup(name).name
    except (LookupError, ValueError):
        return None
    return None if found.replace("_", "-") in NO_CHARSETS else found


def listed(encoding: str) -> list[str]:
    """The encodings of a setting such as `utf-8,cp1252`, in the order in which they are tried. Raises `ConfigError`."""
    names = [name.strip() for name in encoding.split(",")]
    for name in names:
        if text_codec(name) is None:
            fix = "use names that Python knows: utf-8, cp1252, latin-1, shift_jis, …; several are tried in order: utf-8,cp1252"
            raise ConfigError("unknown encoding", field="encoding", found=name, fix=fix)
    return names


def marked(head: bytes) -> str | None:
    """The encoding that a byte-order mark at the beginning of a file says."""
    return next((name for mark, name in BOMS if head.startswith(mark)), None)


def decode(data: bytes, file: str, encoding: str, *, line: int | None = None, offset: int = 0) -> str:
    """Text of `data`. A byte-order mark wins over `encoding`; of several encodings (`utf-8,cp1252`) the first that fits counts.

    `line` and `offset` place `data` inside its file (for formats that are read line by line).
    Raises `DataError` naming line, byte offset and the byte that does not fit, and the encoding that may.
    """
    mark = marked(data) if offset == 0 else None
    names = [mark] if mark else [name.strip() for name in encoding.split(",")]
    first: UnicodeError | None = None
    for name in names:
        try:
            return _strict(data, name)
        except UnicodeError as error:
            first = first or error
    assert first is not None
    raise _misfit(data, first, names, file, line, offset, mark=mark is not None) from first


def _strict(data: bytes, name: str) -> str:
    """Raises `UnicodeError` also for control characters where ISO 8859 has nothing else: such files are Windows' code pages."""
    text = data.decode(name)
    if text.isascii():
        return text
    if _is_iso_8859(name) and (control := CONTROLS.search(data)):
        raise UnicodeDecodeError(name, data, control.start(), control.end(), "a control character")
    if _writes_halves(name):
        text.encode()
    return text


@cache
def _is_iso_8859(name: str) -> bool:
    return codecs.lookup(name).name.startswith("iso8859")


@cache
def _writes_halves(name: str) -> bool:
    """Whether what the encoding reads may be half a character."""
    return codecs.lookup(name).name == "utf-7"


def _misfit(
    data: bytes, error: UnicodeError, names: list[str], file: str, line: int | None, offset: int, *, mark: bool
) -> DataError:  # fmt: skip
    """What a user is told of bytes that fit none of `names`."""
    said = ", ".join(names)
    if not isinstance(error, UnicodeDecodeError):  # UTF-16 without a mark, half a character
        return DataError(f"not {said} text ({error})", file=file, line=line, expected=said, fix="name its encoding")
    start = error.start
    at = data.count(b"\n", 0, start) + 1 if line is None else line
    if start >= len(data):
        shown = "end of file"
    else:
        context = data[max(start - 20, 0) : start + 20]
        shown = f"byte 0x{data[start]:02x} at offset {offset + start}, in {context!r}"
    what = f"not {said} text, as its byte-order mark says it is" if mark else f"not {said} text"
    fix = "fetch or write the file again" if mark else advice(data, start)
    return DataError(what, file=file, line=at, found=shown, expected=said, fix=fix)


def advice(data: bytes, start: int) -> str:
    """What to do about a file of another encoding: the one that may fit, and how it reads the place: the user judges."""
    name = likely(data)
    if name is None:
        how = Setting("encoding", "ENCODING")
        return f"convert it to UTF-8 (iconv -f ENCODING -t utf-8 IN > OUT), or name its encoding ({how})"
    low = data.rfind(b"\n", 0, start) + 1
    end = data.find(b"\n", start)
    line = data[max(low, start - SHOWN) : min(end if end >= 0 else len(data), start + SHOWN)]
    reads = line.decode(name, "replace").strip("\ufffd\r\n ")
    return (
        f"if “{reads}” is right, it is {name}: name that ({Setting('encoding', name)}), or with others that are "
        f"tried first ({Setting('encoding', f'utf-8,{name}')}), or convert the file (iconv -f {name} -t utf-8 IN > OUT)"
    )


def likely(data: bytes) -> str | None:
    """The encoding that bytes may have which are not UTF-8: a guess, for a message. Western texts have few bytes past ASCII."""
    sample = data[: 16 * BLOCK]
    high = sum(byte >= 0x80 for byte in sample[:BLOCK])
    if high > 0.3 * sum(byte >= 0x80 or chr(byte).isalpha() for byte in sample[:BLOCK]):
        try:
            from charset_normalizer import from_bytes  # comes with trafilatura
        except ImportError:
            return None
        best = from_bytes(sample[: BLOCK // 4]).best()
        return str(best.encoding) if best is not None else None
    for name in ("cp1252", "latin-1"):
        try:
            _strict(sample, name)
        except UnicodeError:
            continue
        return name
    return None


def choose(file: IO[bytes], encoding: str) -> str:
    """The first of several encodings that all of a file fits; the first of them where none does, for the error that follows."""
    names = [name.strip() for name in encoding.split(",")]
    for name in names:
        file.seek(0)
        if mark := marked(file.read(4)):
            return mark
        file.seek(0)
        if _fits(file, name):
            return name
    return names[0]


def _fits(file: IO[bytes], name: str) -> bool:
    decoder = codecs.getincrementaldecoder(name)()
    controls = C1 if _is_iso_8859(name) else b""
    try:
        while block := file.read(BLOCK):
            decoder.decode(block)
            if controls and len(block.translate(None, controls)) < len(block):
                return False
        decoder.decode(b"", final=True)
    except UnicodeError:
        return False
    return True


def lines(file: IO[bytes], encoding: str) -> tuple[Iterator[tuple[bytes, bool]], str]:
    """The lines of a file as bytes, each with whether it is whole, and their encoding.

    A line past `LINE_BYTES` is not whole: only its beginning is given. Lines of an encoding whose line feed is not the byte 0x0a
    (UTF-16) come as UTF-8.
    """
    head: bytes = file.peek(4)[:4]  # type: ignore[attr-defined]
    name = marked(head) or encoding
    if name == "utf-8-sig":  # a mark wins over `encoding`
        return _bounded(file, b"\n"), "utf-8"
    if "," in name or "\n".encode(name) == b"\n":
        return _bounded(file, b"\n"), name
    text = io.TextIOWrapper(file, encoding=name, newline="\n")
    return ((line.encode(), whole) for line, whole in _bounded(text, "\n")), "utf-8"


def _bounded(file: Any, end: Any) -> Iterator[tuple[Any, bool]]:
    while line := file.readline(LINE_BYTES):
        whole = len(line) < LINE_BYTES or line.endswith(end)
        yield line, whole
        while not whole and (rest := file.readline(LINE_BYTES)) and not rest.endswith(end):
            pass
