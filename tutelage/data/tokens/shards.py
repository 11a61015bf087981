"""Tokens on disk: a records artifact and a tokenizer become memory-mapped numpy shards. Numpy only, no torch.

    out/
      tokens.json            kind, vocabulary, tokenizer digest, totals of each split; written last
      train/ validation/     tokens.json (totals, shards with their digests), and for each shard
        shard_00000.ids.npy       uint16 where the vocabulary fits, else uint32
        shard_00000.mask.npy      uint8, 1 = supervised; absent where everything is supervised
        shard_00000.segments.npy  `encode.SEGMENT`, one entry a segment
      parts/                 finished chunks of a run that is not done yet; removed at the end

A segment is a document or one rendered sample of a conversation. A document is stored as `[start] + ids + [eos]`, start being
the tokenizer's bos, or its eos where it has none: so every token of the text, the first one included, is the target of
another, and bits per byte count every byte. The start token itself is never a target.

The input is cut into chunks at fixed byte positions, each chunk is one file that appears whole, and chunks are joined in
order: the output does not depend on the number of workers, nor on where an earlier attempt was killed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tutelage.data.tokens.encode import SEGMENT, Chunk, Part, chunks_of, encode_chunks, id_type, read_part, record_type
from tutelage.errors import ArtifactError, DataError
from tutelage.files import file_digest, read_json, read_object, storage_errors, whole_file, write_json

VERSION = 1
SPLITS = ("train", "validation")
AGAIN = "rerun the stage that makes the tokens with --force"
Ints = npt.NDArray[np.int64]
Progress = Callable[[int, int], None]  # (bytes of JSONL done, bytes in all)


def tokenize(
    records: Path,
    tokenizer_folder: Path,
    out: Path,
    *,
    workers: int | None = None,
    shard_tokens: int = 64_000_000,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Tokenizes both splits of a records artifact into `out` and returns the content of `out/tokens.json`.

    `workers` is the number of processes (None: one a core, and none besides this one for small inputs). A shard is closed
    once it holds `shard_tokens`. Parts that an earlier, killed attempt left for the same input are used again. Raises
    `DataError` for a line that can't be tokenized or an empty training split, `ArtifactError` for folders of another kind.
    """
    from tutelage.tokenizer.load import TokenizerFolder

    record = record_type(records)
    kind = "text" if record == "Document" else "chat"
    tokenizer = TokenizerFolder.open(tokenizer_folder)
    plan = {"version": VERSION, "kind": kind, "record": record, "vocabulary": tokenizer.vocab_size, "tokenizer": tokenizer.digest}
    sources = {split: records / f"{split}.jsonl" for split in SPLITS}
    for path in sources.values():
        if not path.is_file():
            raise ArtifactError(
                "the records artifact is not complete", file=path, expected="this file", fix="run the data stage again"
            )
    parts = out / "parts"
    with storage_errors(out):
        _keep_parts_of(parts, {**plan, "records": {split: file_digest(path) for split, path in sources.items()}})
    chunks = {split: chunks_of(path, parts) for split, path in sources.items()}
    _encode_missing([c for split in SPLITS for c in chunks[split]], record, tokenizer_folder, workers, progress)
    with storage_errors(out):
        (out / "tokens.json").unlink(missing_ok=True)
    totals = {split: _join(chunks[split], out / split, {**plan, "split": split}, shard_tokens) for split in SPLITS}
    if totals["train"]["segments"] == 0:
        raise DataError("no record to train on", file=sources["train"], found="0 records", fix="give the data stage more input")
    write_json(out / "tokens.json", {**plan, "splits": totals})
    shutil.rmtree(parts)
    return {**plan, "splits": totals}


def _keep_parts_of(parts: Path, plan: dict[str, Any]) -> None:
    """Parts of the same plan stay; parts of another input, tokenizer or version are removed."""
    made_for = parts / "plan.json"
    if parts.exists() and not (made_for.is_file() and read_json(made_for) == plan):
        shutil.rmtree(parts)
    if not made_for.is_file():
        parts.mkdir(parents=True, exist_ok=True)
        write_json(made_for, plan)


def _encode_missing(chunks: list[Chunk], record: str, tokenizer: Path, workers: int | None, progress: Progress | None) -> None:
    total, missing = sum(c.end - c.begin for c in chunks), [c for c in chunks if not os.path.exists(c.part)]
    done = total - sum(c.end - c.begin for c in missing)

    def one_done(chunk: Chunk) -> None:
        nonlocal done
        done += chunk.end - chunk.begin
        if progress is not None:
            progress(done, total)

    if progress is not None and done:
        progress(done, total)  # what an earlier attempt left, which may be everything
    if workers is None:
        workers = (os.cpu_count() or 1) if len(missing) > 4 else 1  # a process takes longer to start than 4 MiB to tokenize
    encode_chunks(missing, record, tokenizer, workers=workers, progress=one_done)


def _join(chunks: list[Chunk], folder: Path, about: dict[str, Any], shard_tokens: int) -> dict[str, Any]:
    """Joins the parts of a split to shards, in order, and writes the split's index last. Returns the totals."""
    with storage_errors(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    shards = [_write_shard(folder, i, group, about) for i, group in enumerate(_groups(chunks, shard_tokens))]
    counts = {k: sum(s[k] for s in shards) for k in ("segments", "tokens", "supervised", "bytes", "unsupervised")}
    digest = hashlib.sha256("".join(s["digest"] for s in shards).encode()).hexdigest()
    largest = max((s["largest_id"] for s in shards), default=-1)
    totals = {**counts, "largest_id": largest, "digest": digest}
    write_json(folder / "tokens.json", {**about, **totals, "shards": shards})
    return totals


def _groups(chunks: list[Chunk], shard_tokens: int) -> Iterator[list[Part]]:
    group: list[Part] = []
    for chunk in chunks:
        group.append(read_part(chunk.part))
        if sum(len(p.ids) for p in group) >= shard_tokens:
            yield group
            group = []
    if sum(len(p.ids) for p in group):
        yield group


def _write_shard(folder: Path, number: int, group: list[Part], about: dict[str, Any]) -> dict[str, Any]:
    """Writes the arrays of a shard, each whole, and returns its line of the index."""
    begins = np.cumsum([0, *(len(p.ids) for p in group)])
    segments = np.concatenate([p.segments for p in group])
    segments["offset"] += np.repeat(begins[:-1].astype(np.uint64), [len(p.segments) for p in group])
    arrays = {"ids": np.concatenate([p.ids for p in group]), "segments": segments}
    if about["kind"] == "chat":
        arrays["mask"] = np.concatenate([p.mask for p in group])
    largest, seen = int(arrays["ids"].max()), hashlib.sha256()
    if largest >= about["vocabulary"]:
        raise ArtifactError(
            "the tokenizer produced an id outside its vocabulary", found=largest, expected=f"below {about['vocabulary']}"
        )
    for name in sorted(arrays):
        with whole_file(folder / f"shard_{number:05d}.{name}.npy", "wb") as f:
            np.save(f, arrays[name], allow_pickle=False)
        seen.update(np.ascontiguousarray(arrays[name]).view(np.uint8).data)
    sums = {k: int(segments[k].sum(dtype=np.int64)) for k in ("supervised", "bytes")}
    return {
        "segments": len(segments),
        "tokens": int(begins[-1]),
        **sums,
        "unsupervised": int((segments["supervised"] == 0).sum()),
        "largest_id": largest,
        "digest": seen.hexdigest(),
    }


@dataclass(slots=True, frozen=True, kw_only=True)
class Shard:
    """The mapped arrays of one shard."""

    ids: npt.NDArray[Any]  # [n] uint16 or uint32
    mask: npt.NDArray[np.uint8] | None  # [n]; None: everything is supervised


class Segments:
    """One split of a tokens artifact, read through memory maps: only what is touched is in memory.

    `lengths`, `supervised` (targets) and `record_bits` are arrays with one entry a segment, in the order of the records.
    """

    def __init__(self, folder: Path, index: dict[str, Any], shards: list[Shard], table: npt.NDArray[Any], shard_of: Ints) -> None:
        self.folder, self.index = folder, index
        self.kind: str = index["kind"]
        # The type of the records; of preferences, segments 2i and 2i+1 are a pair. Older tokens do not say.
        self.record: str = index.get("record", "Document" if self.kind == "text" else "Conversation")
        self.digest: str = index["digest"]  # of all ids, masks and segments
        self.vocabulary: int = index["vocabulary"]
        self._shards, self._shard_of = shards, shard_of
        self._offsets = table["offset"].astype(np.int64)
        self.lengths: Ints = table["length"].astype(np.int64)
        self.supervised: Ints = table["supervised"].astype(np.int64)
        self.bytes_of: Ints = table["bytes"].astype(np.int64)
        self.record_bits: npt.NDArray[np.uint64] = table["record"].astype(np.uint64)

    @classmethod
    def open(cls, folder: Path, *, vocabulary: int | None = None) -> Segments:
        """Opens `out/train` or `out/validation`. Raises `ArtifactError` when it is missing, unfinished or damaged, or when an
        id is not below `vocabulary` (the rows of a model's embedding table)."""
        index_path = folder / "tokens.json"
        if not index_path.is_file():
            raise ArtifactError(
                "no tokens here, or tokenizing has not finished",
                file=folder,
                expected="a split's folder with tokens.json",
                fix="run the stage that makes the tokens (it goes on where it stopped)",
            )
        index = read_object(index_path, AGAIN)
        if index.get("version") != VERSION or not _is_index(index):
            raise ArtifactError(
                "not the tokens of one split",
                file=index_path,
                found=f"version {index.get('version')}, keys {sorted(index)[:8]}",
                expected=f"version {VERSION} with shards",
                fix=f"open {folder / 'train'}, or rerun the stage that makes the tokens",
            )
        if vocabulary is not None and index["largest_id"] >= vocabulary:
            raise ArtifactError(
                "token ids outside the model's vocabulary",
                file=folder,
                found=f"id {index['largest_id']} (tokenizer {index['tokenizer'][:12]})",
                expected=f"ids below {vocabulary}",
                fix="tokenize with the model's own tokenizer",
            )
        shards, tables = [], [np.empty(0, SEGMENT)]
        for number, facts in enumerate(index["shards"]):
            shard, table = _open_shard(folder, number, facts, index)
            shards.append(shard)
            tables.append(table)
        shard_of = np.repeat(np.arange(len(shards)), [len(t) for t in tables[1:]]).astype(np.int64)
        return cls(folder, index, shards, np.concatenate(tables), shard_of)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def totals(self) -> dict[str, int]:
        """`segments`, `tokens`, `supervised` (targets), `bytes`, `unsupervised` (segments without a target)."""
        return {k: self.index[k] for k in ("segments", "tokens", "supervised", "bytes", "unsupervised")}

    def ids(self, i: int, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """The token ids of segment `i` (or of its tokens start..stop-1), uint16 or uint32, a view of the file. Raises
        `ArtifactError` for a damaged one outside the vocabulary: as they are read, since not all of a large file may ever be."""
        found = self._shards[self._shard_of[i]].ids[self._span(i, start, stop)]
        return self._below(self.vocabulary, found, i, "ids")

    def _below(self, limit: int, found: npt.NDArray[Any], i: int, name: str) -> npt.NDArray[Any]:
        if len(found) and int(found.max()) >= limit:
            raise ArtifactError(
                f"a shard is damaged: segment {i} has a value outside its range",
                file=self.folder / f"shard_{int(self._shard_of[i]):05d}.{name}.npy", found=int(found.max()),
                expected=f"{name} below {limit}", fix=AGAIN,
            )  # fmt: skip
        return found

    def mask(self, i: int, start: int = 0, stop: int | None = None) -> npt.NDArray[np.uint8]:
        """1 for each token that is supervised as a target; token 0 of a segment never is one."""
        mask, span = self._shards[self._shard_of[i]].mask, self._span(i, start, stop)
        return np.ones(span.stop - span.start, np.uint8) if mask is None else self._below(2, mask[span], i, "mask")

    def record_id(self, i: int) -> str:
        """The id of the record, 16 hex digits."""
        return f"{int(self.record_bits[i]):016x}"

    def bytes(self, i: int) -> int:
        """UTF-8 bytes of the text: of the document, or of what is supervised in the conversation."""
        return int(self.bytes_of[i])

    def supervised_in(self, segment: Ints, start: Ints, stop: Ints) -> Ints:
        """The supervised targets of pieces of segments (`pack.Count`)."""
        if self.kind == "text":
            return stop - start - 1
        whole = (start == 0) & (stop == self.lengths[segment])
        counts = np.where(whole, self.supervised[segment], 0)
        for p in np.flatnonzero(~whole).tolist():
            counts[p] = int(self.mask(int(segment[p]), int(start[p]) + 1, int(stop[p])).sum())
        return counts

    def _span(self, i: int, start: int, stop: int | None) -> slice:
        begin, length = int(self._offsets[i]), int(self.lengths[i])
        return slice(begin + start, begin + (length if stop is None else stop))


def _open_shard(folder: Path, number: int, facts: dict[str, Any], index: dict[str, Any]) -> tuple[Shard, npt.NDArray[Any]]:
    names = ["ids", "segments", "mask"] if index["kind"] == "chat" else ["ids", "segments"]
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name in names:
        path = folder / f"shard_{number:05d}.{name}.npy"
        expected = facts["segments" if name == "segments" else "tokens"]
        dtype = {"ids": np.dtype(id_type(index["vocabulary"])), "segments": SEGMENT, "mask": np.dtype(np.uint8)}[name]
        try:
            arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ArtifactError(f"a shard is missing or damaged ({error})", file=path, fix=AGAIN) from error
        if arrays[name].shape != (expected,) or arrays[name].dtype != dtype:
            raise ArtifactError(
                "a shard is not the one of the index",
                file=path,
                found=f"{arrays[name].dtype}, {arrays[name].shape}",
                expected=f"{dtype}, ({expected},)",
                fix=AGAIN,
            )
    table = np.array(arrays["segments"])
    _check_segments(table, len(arrays["ids"]), folder / f"shard_{number:05d}.segments.npy")
    return Shard(ids=arrays["ids"], mask=arrays.get("mask")), table


def _check_segments(table: npt.NDArray[Any], tokens: int, file: Path) -> None:
    """Raises `ArtifactError` for segments that are not one after the other in a shard of `tokens`."""
    lengths = table["length"].astype(np.int64)
    begins = np.cumsum(lengths) - lengths
    wrong = (table["offset"] != begins.astype(np.uint64)) | (lengths < 1) | (table["supervised"] > table["length"])
    first = int(np.argmax(wrong)) if wrong.any() else len(table)
    if first < len(table) or int(lengths.sum()) != tokens:
        raise ArtifactError(
            "a shard is damaged: its segments do not follow one another", file=file,
            found=f"segment {first}: {table[first]}" if first < len(table) else f"{int(lengths.sum())} tokens in all",
            expected=f"segments that are {tokens} tokens together", fix=AGAIN,
        )  # fmt: skip


COUNTS = ("segments", "tokens", "supervised", "bytes", "unsupervised", "largest_id", "vocabulary")  # whole numbers of an index


def _is_index(index: dict[str, Any]) -> bool:
    shards = index.get("shards")
    return (
        all(isinstance(index.get(key), int) for key in COUNTS)
        and all(isinstance(index.get(key), str) for key in ("kind", "digest", "tokenizer"))
        and isinstance(shards, list)
        and all(isinstance(shard, dict) and isinstance(shard.get("tokens"), int) for shard in shards)
        and all(isinstance(shard.get("segments"), int) for shard in shards)
    )
