"""Chunks of a records file -> files of token ids, on every core. The mechanism under `tokens.tokenize`.

A chunk owns the lines that begin inside its byte range. Each finished chunk is one file that appears whole, so a killed run
goes on where it stopped. Workers (`tutelage.workers`) import neither torch nor the caller's main module, and none outlives a
parent that was killed.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from tutelage import log
from tutelage.errors import ArtifactError, DataError, UserError
from tutelage.files import read_object, whole_file
from tutelage.records import TYPES, Conversation, Preference, from_json
from tutelage.workers import Answer, Workers

if TYPE_CHECKING:
    from tutelage.chat.render import Rendered

CHUNK_BYTES = 1 << 20  # 1 MiB of JSONL: enough work to hide a worker's round trip, small enough to share out evenly
SEGMENT = np.dtype([("record", "<u8"), ("offset", "<u8"), ("length", "<u4"), ("bytes", "<u4"), ("supervised", "<u4")])
TOKENIZED = ("Document", "Conversation", "Preference", "Rating")
Ids = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(slots=True, frozen=True, kw_only=True)
class Chunk:
    """A range of a records file and the file that its tokens go to."""

    source: str
    begin: int  # bytes
    end: int
    part: str


@dataclass(slots=True, frozen=True, kw_only=True)
class Part:
    """The tokens of a chunk: one array of ids, its mask (empty where everything is supervised) and its segments."""

    ids: Ids  # [n]
    mask: npt.NDArray[np.uint8]  # [n] or [0]
    segments: npt.NDArray[Any]  # [s] SEGMENT, offsets from the start of this part


class Encoder(Protocol):
    """What this file needs of a tokenizer."""

    kind: str  # text | chat
    dtype: str  # of the ids on disk

    def encode(self, lines: list[bytes]) -> Part:
        """The tokens of JSONL lines. Raises `BadLine`."""


class BadLine(Exception):
    """Line `index` of the lines given (0 is the first) can't be encoded."""

    def __init__(self, index: int, error: Exception) -> None:
        super().__init__(str(error))
        self.index, self.error = index, error


def id_type(vocabulary: int) -> str:
    return "uint16" if vocabulary <= 65536 else "uint32"


class TextEncoder:
    """Documents: [start] + ids + [eos], everything supervised but the start token."""

    kind = "text"

    def __init__(self, folder: Path) -> None:
        from tutelage.tokenizer.load import TokenizerFolder

        tokenizer = TokenizerFolder.open(folder)
        if tokenizer.eos_id is None:
            raise ArtifactError(
                "the tokenizer has no end token", file=folder, field="eos_token", fix="name one in tokenizer_config.json"
            )
        self._encoder, self.dtype, self._end = tokenizer.encoder(), id_type(tokenizer.vocab_size), tokenizer.eos_id
        self._start = tokenizer.start_id

    def encode(self, lines: list[bytes]) -> Part:
        texts, segments = [], np.zeros(len(lines), SEGMENT)
        for index, line in enumerate(lines):
            try:
                row = json.loads(line)
                text = row["text"]
                segments[index] = (int(row["id"], 16), 0, 0, len(text.encode()), 0)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise BadLine(index, error) from error
            texts.append(text)
        inner, lengths = self._encoder.encode_joined(texts)
        segments["length"], segments["supervised"] = lengths + 2, lengths + 1
        ends = np.cumsum(lengths + 2)
        begins = ends - lengths - 2
        segments["offset"] = begins
        ids = np.empty(len(inner) + 2 * len(lines), self.dtype)
        middle = np.ones(len(ids), bool)
        middle[begins] = middle[ends - 1] = False
        ids[begins], ids[ends - 1], ids[middle] = self._start, self._end, inner
        return Part(ids=ids, mask=np.empty(0, np.uint8), segments=segments)


class ChatEncoder:
    """Conversations, through the one renderer: each rendered sample is a segment with its own mask. Of records about answers
    each answer is a segment, supervised alone: the chosen one first, then the rejected one."""

    kind = "chat"

    def __init__(self, folder: Path, record: str = "Conversation") -> None:
        from tutelage.chat.render import Renderer

        self._renderer = Renderer(folder)
        self._record = record
        self.dtype = id_type(self._renderer.tokenizer.vocab_size)

    def encode(self, lines: list[bytes]) -> Part:
        records: list[Conversation] = []
        for index, line in enumerate(lines):
            try:
                records += self._conversations(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise BadLine(index, error) from error
        rendered = zip(records, self._render(records, len(records) // max(1, len(lines))), strict=True)
        last = self._record != "Conversation"  # a template may make a sample of each turn; the answer is the last
        samples = [(int(c.id, 16), s) for c, group in rendered for s in (group[-1:] if last else group)]
        segments = np.zeros(len(samples), SEGMENT)
        for i, (record, sample) in enumerate(samples):
            size = sum(len(sample.text[a:b].encode()) for a, b in sample.spans)
            segments[i] = (record, 0, len(sample.ids), size, int(sample.mask[1:].sum()))
        segments["offset"] = np.cumsum(segments["length"], dtype=np.uint64) - segments["length"]
        ids = [np.empty(0, self.dtype), *(s.ids.astype(self.dtype) for _, s in samples)]
        masks = [np.empty(0, np.uint8), *(s.mask for _, s in samples)]
        return Part(ids=np.concatenate(ids), mask=np.concatenate(masks), segments=segments)

    def _conversations(self, row: dict[str, Any]) -> list[Conversation]:
        """What is rendered of a record."""
        if self._record == "Conversation":
            return [from_json(Conversation, row)]
        record: Any = from_json(TYPES[self._record], row)
        answers = (record.chosen, record.rejected) if isinstance(record, Preference) else (record.answer,)
        asked = [replace(m, train=False) if m.role == "assistant" else m for m in record.prompt]
        return [
            Conversation(id=record.id, messages=(*asked, *answer), tools=record.tools, style=record.style, source=record.source)
            for answer in answers
        ]

    def _render(self, records: list[Conversation], each: int) -> list[list[Rendered]]:
        """All at once, which is several times faster; one by one to find the line only if that fails. `each`: of one line."""
        try:
            return self._renderer.render_batch(records)
        except UserError:
            for index, record in enumerate(records):
                try:
                    self._renderer.render(record)
                except UserError as error:
                    raise BadLine(index // each, error) from error
            raise


def open_encoder(record: str, folder: Path) -> Encoder:
    return TextEncoder(folder) if record == "Document" else ChatEncoder(folder, record)


def chunks_of(source: Path, parts: Path) -> list[Chunk]:
    """The chunks of a records file, in order. They depend on its size alone."""
    size = source.stat().st_size
    begins = range(0, size, CHUNK_BYTES)
    return [
        Chunk(source=str(source), begin=b, end=min(b + CHUNK_BYTES, size), part=str(parts / f"{source.stem}_{i:06d}.npy"))
        for i, b in enumerate(begins)
    ]


def lines_of(chunk: Chunk) -> list[bytes]:
    """The lines that begin in the chunk's range, empty ones left out."""
    with open(chunk.source, "rb") as f:
        f.seek(max(chunk.begin - 1, 0))
        if chunk.begin:
            f.readline()  # the rest of a line that began before; nothing if the byte before is a line end
        at = f.tell()
        text = f.read(chunk.end - at) if at < chunk.end else b""
        if text and not text.endswith(b"\n"):
            text += f.readline()
    return [x for x in text.split(b"\n") if x.strip()]


def encode_chunk(encoder: Encoder, chunk: Chunk) -> None:
    """Writes the chunk's part: three arrays after one another in one file. Raises `DataError` naming the line."""
    lines = lines_of(chunk)
    try:
        part = encoder.encode(lines)
    except BadLine as bad:
        raise _data_error(chunk, lines, bad) from bad
    with whole_file(Path(chunk.part), "wb") as f:
        for array in (part.ids, part.mask, part.segments):
            np.save(f, array, allow_pickle=False)


def read_part(path: str) -> Part:
    """What `encode_chunk` wrote. Raises `ArtifactError` for a damaged file."""
    try:
        with open(path, "rb") as f:
            ids, mask, segments = (np.load(f, allow_pickle=False) for _ in range(3))
    except (ValueError, EOFError) as error:
        raise ArtifactError(
            f"a part of an earlier attempt is damaged ({error})", file=path, fix="remove it, and run the same command again"
        ) from None
    return Part(ids=ids, mask=mask, segments=segments)


def encode_chunks(chunks: list[Chunk], record: str, tokenizer: Path, *, workers: int, progress: Callable[[Chunk], None]) -> None:
    """Writes the part of every chunk. With one worker in this process, else in `workers` processes."""
    if workers <= 1 or len(chunks) < 2:
        encoder = open_encoder(record, tokenizer) if chunks else None
        for chunk in chunks:
            assert encoder is not None
            encode_chunk(encoder, chunk)
            progress(chunk)
        return
    env = {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # the processes are the parallelism
    setup = {"record": record, "tokenizer": str(tokenizer)}
    pool = Workers(f"{__name__}:chunk_encoder", setup, most=min(workers, len(chunks)), env=env)
    with contextlib.closing(pool), contextlib.closing(pool.ask_all(map(asdict, chunks))) as answers:
        for chunk, answer in zip(chunks, answers, strict=True):
            _refuse(answer, chunk)
            progress(chunk)


def chunk_encoder(setup: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any] | None]:
    """The worker's side: encodes one chunk at a time; the fields of an error, or None."""
    encoder: Encoder | None = None

    def encode(chunk: dict[str, Any]) -> dict[str, Any] | None:
        nonlocal encoder
        try:
            encoder = encoder or open_encoder(setup["record"], Path(setup["tokenizer"]))
            encode_chunk(encoder, Chunk(**chunk))
        except UserError as error:
            return error_fields(error)
        return None

    return encode


def _refuse(answer: Answer, chunk: Chunk) -> None:
    """Raises the error of a chunk that was not encoded."""
    if answer.value:
        raise DataError(**answer.value)
    if answer.why:
        if answer.trace:
            log.say(answer.trace.rstrip())
        raise ArtifactError(
            "a tokenizing worker ended before its work was done", file=chunk.source, found=answer.why,
            fix="run again (finished parts are kept); with less memory, lower workers",
        )  # fmt: skip


def error_fields(error: UserError) -> dict[str, Any]:
    """A user error as keyword arguments that make it again."""
    out = {k: getattr(error, k) for k in ("message", "line", "field", "expected", "fix")}
    return {**out, "file": error.file and str(error.file), "found": None if error.found is None else str(error.found)}


def _data_error(chunk: Chunk, lines: list[bytes], bad: BadLine) -> DataError:
    """Names the line in the whole file: counts line ends before the chunk, which only an error pays for."""
    line = lines[bad.index]
    with open(chunk.source, "rb") as f:
        content = f.read()
    number = content[: content.index(line, max(0, chunk.begin - 1))].count(b"\n") + 1
    inner = bad.error
    if isinstance(inner, UserError):
        return DataError(
            inner.message,
            file=chunk.source,
            line=number,
            field=inner.field,
            found=inner.found,
            expected=inner.expected,
            fix=inner.fix,
        )
    return DataError(
        f"not a record that can be tokenized ({type(inner).__name__}: {inner})",
        file=chunk.source,
        line=number,
        found=line.decode("utf-8", "replace"),
        fix="rerun the stage that wrote this file with --force",
    )


def record_type(records: Path) -> str:
    """The type of a records artifact that can be tokenized. Raises `ArtifactError`."""
    schema = records / "schema.json"
    if not schema.is_file():
        raise ArtifactError(
            "not a records artifact", file=records, expected="a folder with schema.json", fix="run the data stage first"
        )
    found = read_object(schema).get("type")
    if found not in TOKENIZED:
        raise ArtifactError(
            "records of this type have no tokens", file=schema, field="type", found=found, expected=" | ".join(TOKENIZED)
        )
    return str(found)
