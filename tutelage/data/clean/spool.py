"""Records on disk between two passes: written once, read again in order or one at a time, nothing held but offsets."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


class Spool:
    """A file of JSON lines with the byte offset of each, to be deleted when the pass is over.

    `held_out[i]` is 1 where line i belongs to the validation part; `alive[i]` is 0 where a later pass left it out.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offsets = array("Q")
        self.held_out = bytearray()
        self.alive = bytearray()
        self._file: IO[bytes] = path.open("w+b", buffering=1 << 20)
        self._end = 0

    def __len__(self) -> int:
        return len(self.offsets)

    def append(self, row: dict[str, Any], *, held_out: bool) -> None:
        data = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        self.offsets.append(self._end)
        self.held_out.append(held_out)
        self.alive.append(1)
        self._file.write(data)
        self._end += len(data)

    def lines(self, *, held_out: bool | None = None) -> Iterator[tuple[int, bytes]]:
        """(index, line) of the records still alive, of one part or of both."""
        self._file.flush()
        with self.path.open("rb", buffering=1 << 20) as f:
            for i, line in enumerate(f):
                if self.alive[i] and (held_out is None or self.held_out[i] == held_out):
                    yield i, line

    def row(self, i: int) -> dict[str, Any]:
        """The object of line i, whether alive or not."""
        self._file.flush()
        with self.path.open("rb") as f:
            f.seek(self.offsets[i])
            row: dict[str, Any] = json.loads(f.readline())
        return row

    def close(self) -> None:
        """Closes and deletes the file."""
        self._file.close()
        self.path.unlink(missing_ok=True)
