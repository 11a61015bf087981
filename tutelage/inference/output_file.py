"""Results that come in any order, on disk at once, until they are all there and become one file in order.

Beside `OUT`: `OUT.part`, a line a result (`{"row": index, "tokens": [prompt, answer], "result": {…}}`), and `OUT.state.json`,
what the results were made from. A killed attempt leaves whole lines and at most one cut one, which is dropped.
"""

from __future__ import annotations

import fcntl
import json
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from tutelage import log
from tutelage.errors import ConfigError, DataError, StorageError
from tutelage.files import read_object, whole_file, write_json

OPTION = "--output"
OVER = "--force starts over; or choose another file with --output"


def check_output(output: Path, replace: bool) -> None:
    """Raises `ConfigError` where `output` can't be written: a folder, or, unless it is to be replaced, a file that is there."""
    if output.is_dir():
        raise ConfigError("the output is a folder", field="output", found=str(output), expected="a file, such as answers.jsonl")
    if output.exists() and not output.is_file():  # a finished output takes its place: of a device, too
        raise ConfigError(
            "the output is a device or a pipe", field="output", found=str(output), expected="a file, such as answers.jsonl",
            fix="choose a file with --output; only a regular file is ever replaced",
        )  # fmt: skip
    if output.exists() and not replace:
        raise ConfigError("this file is there already", file=output, fix="choose another with --output, or --force to replace it")


class ResumableOutput:
    """The results so far. Used as a context, so that its lock is given back.

    identity: what the results depend on. rows: at most so many there are. Raises `ConfigError` where results of another identity,
    or a finished file, are in the way (`force` discards them), `StorageError` where another process is at work on the same file.
    """

    def __init__(self, output: Path, identity: Mapping[str, Any], force: bool = False, rows: int = 1 << 24) -> None:
        self.output, self.most = output, rows
        self.path, self.state = (output.with_name(output.name + end) for end in (".part", ".state.json"))
        self.offsets = array("q")  # of each row's line; -1 where there is none yet
        self.rows = self.failed = self.prompt_tokens = self.answer_tokens = 0
        check_output(output, force or self.state.exists())
        output.parent.mkdir(parents=True, exist_ok=True)
        self.file: IO[bytes] = self.path.open("a+b")
        try:
            self._open(dict(identity), force)
        except BaseException:
            self.file.close()
            raise

    def _open(self, identity: dict[str, Any], force: bool) -> None:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(
                "another process is at work on this file", file=self.output, fix="wait for it, or stop it"
            ) from None
        for left in self.output.parent.glob(f".{self.output.name}.partial-*"):  # of a process that was killed
            left.unlink()
        if force:
            self.file.truncate(0)
        elif self.state.exists() or self.file.tell():
            self._check(read_object(self.state, OVER) if self.state.exists() else {}, identity)
        write_json(self.state, identity)
        self._recover()

    def _check(self, then: dict[str, Any], now: dict[str, Any]) -> None:
        changed = [k for k in {**then, **now} if then.get(k) != now.get(k)]
        if changed:
            shown = [f"{k} was {then.get(k)!r}, is {now.get(k)!r}" for k in changed if k not in ("input", "model")]
            other = [f"another {k}" for k in changed if k in ("input", "model")]
            raise ConfigError(
                "what is there of this file was made from something else", file=self.path, found="; ".join([*other, *shown]),
                fix="give the same command as then, choose another --output, or --force to start over",
            )  # fmt: skip

    def _recover(self) -> None:
        """Finds the whole lines, and cuts off what follows them."""
        self.file.seek(0)
        offset = 0
        for number, line in enumerate(self.file, 1):
            row = _row_of(line, self.most)
            if row is None:
                lines = (line + self.file.read()).count(b"\n")
                if lines:  # more than a last line that a kill cut short
                    log.say(f"{self.path}:{number}: a damaged line; from here on {lines:,} rows are done again", style="yellow")
                self.file.truncate(offset)
                break
            self._count(row["row"], row["tokens"], offset)
            offset += len(line)
        self.file.seek(0, 2)

    def _count(self, index: int, tokens: list[int] | None, offset: int) -> None:
        while len(self.offsets) <= index:
            self.offsets.append(-1)
        self.offsets[index] = offset
        self.rows += 1
        self.failed += tokens is None
        self.prompt_tokens += tokens[0] if tokens else 0
        self.answer_tokens += tokens[1] if tokens else 0

    def holds(self, index: int) -> bool:
        return index < len(self.offsets) and self.offsets[index] >= 0

    def append(self, index: int, result: Mapping[str, Any], tokens: list[int] | None) -> None:
        """Keeps the result of row `index`. `tokens` are those of prompt and answer; None where there is an error instead."""
        offset = self.file.tell()
        self.file.write(_dump({"row": index, "tokens": tokens, "result": result}))
        self.file.flush()
        self._count(index, tokens, offset)

    def finish(self, rows: int) -> None:
        """Writes the output, whole and in order, and removes what it was made from. Raises `DataError` if a row has no result."""
        missing = next((i for i in range(rows) if not self.holds(i)), None)
        if missing is not None or len(self.offsets) != rows:
            raise DataError("the input changed while it was read", found=f"{self.rows} results", expected=f"{rows} rows")
        with whole_file(self.output, "wb", OPTION) as f:
            for offset in self.offsets:
                self.file.seek(offset)
                f.write(_dump(json.loads(self.file.readline())["result"]))
        self.path.unlink()
        self.state.unlink()

    def __enter__(self) -> ResumableOutput:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def _row_of(line: bytes, rows: int) -> dict[str, Any] | None:
    """A line of a part file of so many rows; None for one that is damaged or cut short."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not isinstance(row.get("result"), dict):
        return None
    index, tokens = row.get("row"), row.get("tokens", ())
    whole = tokens is None or (isinstance(tokens, list) and len(tokens) == 2 and all(isinstance(n, int) for n in tokens))
    return row if whole and isinstance(index, int) and 0 <= index < rows else None


def _dump(row: Mapping[str, Any]) -> bytes:
    """One line of JSON. Values that JSON lacks, such as the dates of Parquet, become texts."""
    try:
        return json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n"
    except UnicodeEncodeError:  # a field with half a character
        return json.dumps(row, default=str).encode() + b"\n"
