"""Files that are cut short, damaged, of another version or of another kind."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
import torch
from gguf_files import byte_tokens, plain, tiny, write

from tutelage.errors import ArtifactError, UserError
from tutelage.gguf.reader import is_gguf, read
from tutelage.models.open import load
from tutelage.tokenizer.load import TokenizerFolder


def test_a_file_cut_anywhere_is_an_error(tmp_path: Path) -> None:
    """Guards reads beyond the end: a download that broke off must not become a traceback, or a model of zeros."""
    whole = tiny(tmp_path / "whole.gguf").read_bytes()
    read(tmp_path / "whole.gguf")
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 200), *range(200, len(whole), 701), len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(ArtifactError, match=r"cut\.gguf") as caught:
            read(cut)
        assert "again" in str(caught.value)


def test_damage_is_an_error_or_another_valid_file(tmp_path: Path) -> None:
    """Guards counts and lengths that are believed: a wrong one could ask for all memory, or loop for ever."""
    whole, draw = tiny(tmp_path / "whole.gguf").read_bytes(), random.Random(0)
    header = read(tmp_path / "whole.gguf").tensors["token_embd.weight"].start
    for number in range(150):
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            damaged[draw.randrange(header)] = draw.choice((0, 1, 127, 255))
        file = tmp_path / f"{number}.gguf"
        file.write_bytes(damaged)
        try:
            load(file)
            TokenizerFolder.open(file)
        except UserError as error:
            assert error.file is not None
        file.unlink()


@pytest.mark.parametrize(
    ("head", "named"),
    [
        (b"GGUF" + struct.pack("<I", 4), "version of the future"),
        (b"GGUF" + struct.pack("<I", 1), "older version"),
        (b"GGUF" + struct.pack(">I", 3), "big-endian"),
        (b"tjgg" + struct.pack("<I", 3), "before GGUF"),
        (b"PK\3\4" + bytes(4), "not a GGUF file"),
    ],
)
def test_other_versions_and_kinds_are_named(head: bytes, named: str, tmp_path: Path) -> None:
    """Guards against a version that means something else being read as this one."""
    file = tmp_path / "model.gguf"
    file.write_bytes(head + bytes(64))
    with pytest.raises(ArtifactError, match=named):
        read(file)


@pytest.mark.parametrize(("number", "named"), [(10, "Q2_K"), (23, "IQ4_XS"), (39, "MXFP4"), (199, "type 199, which is unknown")])
def test_a_type_that_is_not_read_is_named(number: int, named: str, tmp_path: Path) -> None:
    """Guards the user who took the wrong file: the error says which type it is and which to take."""
    file = write(tmp_path / "model.gguf", {}, {"w": ((2, 256), number, bytes(1024))})
    with pytest.raises(ArtifactError, match=named) as caught:
        read(file)
    assert "Q4_K" in str(caught.value) and "w" in str(caught.value)


@pytest.mark.parametrize(
    ("tensor", "named"), [(((2, 33), 8, bytes(68)), "rows of a multiple of 32"), (((0, 32), 8, b""), "no zero")]
)
def test_shapes_fit_their_types(tensor: tuple[tuple[int, ...], int, bytes], named: str, tmp_path: Path) -> None:
    """Guards blocks that would reach across rows."""
    with pytest.raises(ArtifactError, match=named):
        read(write(tmp_path / "model.gguf", {}, {"w": tensor}))


def test_values_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    """Guards a damaged scale: one infinity in the weights makes every answer NaN."""
    file = tiny(tmp_path / "model.gguf")
    place = read(file).tensors["blk.0.ffn_up.weight"]
    raw = bytearray(file.read_bytes())
    raw[place.start : place.start + 4] = struct.pack("<f", float("inf"))
    file.write_bytes(raw)
    with pytest.raises(ArtifactError, match="not finite"):
        load(file)


def test_a_gguf_file_is_known_by_its_content(tmp_path: Path) -> None:
    """Guards files under the names that stores of blobs give them."""
    blob = tiny(tmp_path / "sha256-0123")
    assert is_gguf(blob)
    assert not is_gguf(tmp_path)
    (tmp_path / "notes.txt").write_text("GGU")
    assert not is_gguf(tmp_path / "notes.txt")
    assert load(blob).config.num_hidden_layers == 1


def test_any_alignment_and_half_precision(tmp_path: Path) -> None:
    """Guards offsets that follow the file's alignment, and values at odd places."""
    wanted = torch.arange(96, dtype=torch.float32).view(3, 32)
    file = write(tmp_path / "m.gguf", byte_tokens(), {"a": plain(wanted, "F16"), "b": plain(wanted, "BF16"), "c": plain(wanted)})
    from tutelage.gguf.dequantize import dequantize

    raw = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)
    for place in read(file).tensors.values():
        assert torch.equal(dequantize(raw[place.start : place.start + place.size], place.type).view(place.shape), wanted)
