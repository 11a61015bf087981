"""Reads the header of a GGUF file: metadata and where each tensor lies. Every read is checked against the file's size.

Little-endian files of versions 2 and 3. Imports without torch.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

from tutelage.errors import ArtifactError
from tutelage.gguf.blocks import BLOCKS, OTHERS, BlockType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
OLDER_MAGICS = (b"tjgg", b"fmgg", b"lmgg", b"algg")  # ggjt, ggmf, ggml, ggla as they lie in a file
AGAIN = "download or copy the file again"
CONVERT = "convert the model again with a current llama.cpp (convert_hf_to_gguf.py)"

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
MOST_DIMENSIONS, DEEPEST = 4, 4  # of a tensor; arrays within arrays
LONGEST_NAME = 65535


@dataclass(slots=True, frozen=True)
class TensorPlace:
    """Where a tensor lies."""

    name: str
    shape: tuple[int, ...]  # rows first, as in Hugging Face; the file has it the other way round
    type: BlockType
    start: int  # byte of the file
    size: int  # bytes


@dataclass(slots=True, frozen=True)
class Gguf:
    """The header of a file.

    Example:
        >>> read("model.gguf").metadata["general.architecture"]
        'llama'
    """

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, TensorPlace]

    def wrong(self, message: str, key: str, found: object, expected: str | None = None, fix: str = CONVERT) -> ArtifactError:
        """An error about one key of the metadata."""
        return ArtifactError(message, file=self.path, field=key, found="nothing" if found is None else found, expected=expected,
                             fix=fix)  # fmt: skip


def is_gguf(path: Path) -> bool:
    """Whether a path is that of a GGUF file, by its first bytes or, so that an error can say what is wrong with it, its name."""
    if not path.is_file():
        return False
    if path.suffix.lower() == ".gguf":
        return True
    try:
        with path.open("rb") as f:
            return f.read(4) == MAGIC
    except OSError:
        return False


def read(path: Path | str) -> Gguf:
    """The header of a file. Raises `ArtifactError` for a file that is cut short, damaged, of another version or of another kind,
    and for tensors of a type that is not read."""
    path = Path(path)
    try:
        found = path.stat()
    except OSError as error:
        raise ArtifactError(f"the file cannot be read ({error.strerror or error})", file=path) from error
    return _read(path, (found.st_size, found.st_mtime_ns))


@lru_cache(maxsize=1)  # a model's configuration, tokenizer and weights ask one after the other
def _read(path: Path, state: tuple[int, int]) -> Gguf:
    try:
        with path.open("rb") as f:
            if not state[0]:
                raise ArtifactError("an empty file, not a GGUF file", file=path, fix=AGAIN)
            with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Header(path, data).read()
    except OSError as error:
        raise ArtifactError(f"the file cannot be read ({error.strerror or error})", file=path) from error


class _Header:
    """One header being read, from its beginning to its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.size, self.at = path, data, len(data), 0

    def read(self) -> Gguf:
        version = self.version()
        tensors, keys = self.number("<Q", "the number of tensors"), self.number("<Q", "the number of metadata keys")
        # A tensor and a key take 24 and 13 bytes at least, which bounds the loops below.
        if tensors * 24 + keys * 13 > self.size:
            raise self.damaged("more tensors and keys than the file has room for", found=f"{tensors} tensors, {keys} keys")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            name = self.name("a metadata key")
            if name in metadata:
                raise self.damaged("a metadata key is there twice", field=name)
            metadata[name] = self.value(self.number("<I", name), name)
        rows = [self.row() for _ in range(tensors)]
        return Gguf(self.path, version, metadata, self.places(rows, self.alignment(metadata)))

    def version(self) -> int:
        magic = self.data[:4]
        if magic != MAGIC:
            older = magic in OLDER_MAGICS
            raise ArtifactError(
                "a model of llama.cpp from before GGUF" if older else "not a GGUF file", file=self.path, found=magic,
                expected=f"a file that begins with {MAGIC!r}", fix=CONVERT if older else AGAIN,
            )  # fmt: skip
        self.at = 4
        found = self.number("<I", "the version")
        if found in VERSIONS:
            return found
        swapped = int.from_bytes(found.to_bytes(4, "little"), "big")
        what = "an older version" if found < min(VERSIONS) else "a version of the future"
        said = f"{found}"
        if swapped in (1, *VERSIONS):
            what, said = "the byte order of big-endian machines", f"version {swapped}, big-endian"
        raise ArtifactError(
            f"this GGUF file has {what}, which is not read here", file=self.path, field="version", found=said,
            expected=" or ".join(map(str, VERSIONS)) + ", little-endian",
            fix="update tutelage, or write the file as version 3" if what.endswith("future") else CONVERT,
        )  # fmt: skip

    def need(self, count: int, what: str) -> int:
        """Moves on by `count` bytes and returns where they start."""
        start = self.at
        if count > self.size - start:
            raise ArtifactError(
                f"the file is cut short, or damaged: it ends inside {what}", file=self.path,
                found=f"{self.size:,} bytes", expected=f"at least {start + count:,}", fix=AGAIN,
            )  # fmt: skip
        self.at = start + count
        return start

    def number(self, form: str, what: str) -> Any:
        return struct.unpack_from(form, self.data, self.need(struct.calcsize(form), what))[0]

    def text(self, what: str) -> str:
        length = self.number("<Q", what)
        start = self.need(length, what)
        try:
            return self.data[start : start + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(
                "a text that is not UTF-8", field=what, found=self.data[start : start + min(length, 40)]
            ) from error

    def name(self, what: str) -> str:
        name = self.text(what)
        if not name or len(name) > LONGEST_NAME:
            raise self.damaged(f"{what} has no name, or a very long one", found=name[:80])
        return name

    def value(self, kind: int, key: str, depth: int = 0) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind], key)
        if kind == STRING:
            return self.text(key)
        if kind != ARRAY or depth == DEEPEST:
            raise self.damaged("a metadata value of an unknown type", field=key, found=kind, expected="a type from 0 to 12")
        inner, count = self.number("<I", key), self.number("<Q", key)
        if inner in SCALARS:
            form = SCALARS[inner][1]
            start = self.need(count * struct.calcsize(f"<{form}"), key)
            return list(struct.unpack_from(f"<{count}{form}", self.data, start))
        if count * 8 > self.size - self.at:  # a text takes 8 bytes at least, an array 12
            self.need(count * 8, key)
        return self.texts(count, key) if inner == STRING else [self.value(inner, key, depth + 1) for _ in range(count)]

    def texts(self, count: int, key: str) -> list[str]:
        """`text` of each, in one loop: vocabularies have hundreds of thousands."""
        data, size, at, length_at = self.data, self.size, self.at, struct.Struct("<Q").unpack_from
        out = []
        for _ in range(count):
            end = at + 8
            if end <= size:
                end += length_at(data, at)[0]
            if end > size:
                self.at = at
                self.need(end - at, key)
            out.append(data[at + 8 : end])
            at = end
        self.at = at
        try:
            return [text.decode("utf-8") for text in out]
        except UnicodeDecodeError as error:
            raise self.damaged("a text that is not UTF-8", field=key, found=error.object[:40]) from error

    def row(self) -> tuple[str, tuple[int, ...], int, int]:
        """One row of the table of tensors: name, shape, number of the type, offset."""
        name = self.name("the table of tensors")
        count = self.number("<I", name)
        if count > MOST_DIMENSIONS:
            raise self.damaged(
                "a tensor with too many dimensions", field=name, found=count, expected=f"at most {MOST_DIMENSIONS}"
            )
        shape = tuple(self.number("<Q", name) for _ in range(count))[::-1]
        return name, shape, self.number("<I", name), self.number("<Q", name)

    def alignment(self, metadata: dict[str, Any]) -> int:
        found = metadata.get("general.alignment", 32)
        if not isinstance(found, int) or found < 1 or found & (found - 1):
            raise self.damaged("not an alignment", field="general.alignment", found=found, expected="a power of two")
        return found

    def places(self, rows: list[tuple[str, tuple[int, ...], int, int]], alignment: int) -> dict[str, TensorPlace]:
        base = -(-self.at // alignment) * alignment
        out: dict[str, TensorPlace] = {}
        for name, shape, number, offset in rows:
            if name in out:
                raise self.damaged("a tensor is there twice", field=name)
            kind = self.kind(name, number)
            if not all(shape) or (shape and shape[-1] % kind.values):
                expected = f"no zero, and rows of a multiple of {kind.values} values ({kind.name})"
                raise self.damaged("a tensor's shape does not fit its type", field=name, found=list(shape), expected=expected)
            if offset % alignment:
                raise self.damaged(
                    "a tensor that is not aligned", field=name, found=offset, expected=f"a multiple of {alignment}"
                )
            size = kind.bytes_of(prod(shape))
            if base + offset + size > self.size:
                raise ArtifactError(
                    "the file is cut short, or damaged: a tensor reaches beyond its end", file=self.path, field=name,
                    found=f"{self.size:,} bytes", expected=f"at least {base + offset + size:,}", fix=AGAIN,
                )  # fmt: skip
            out[name] = TensorPlace(name, shape, kind, base + offset, size)
        return out

    def kind(self, name: str, number: int) -> BlockType:
        if number not in BLOCKS:
            known = ", ".join(block.name for block in BLOCKS.values())
            raise ArtifactError(
                f"a tensor is stored as {OTHERS.get(number, f'type {number}, which is unknown')}, which is not read here",
                file=self.path, field=name, expected=f"one of {known}",
                fix="take the file of another quantization, such as Q8_0 or Q4_K_M",
            )  # fmt: skip
        return BLOCKS[number]

    def damaged(
        self, message: str, *, field: str | None = None, found: object = None, expected: str | None = None
    ) -> ArtifactError:
        return ArtifactError(
            f"a damaged GGUF file: {message}", file=self.path, field=field, found=found, expected=expected, fix=AGAIN
        )
