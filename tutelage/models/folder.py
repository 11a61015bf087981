"""What a model folder holds: its configuration, its safetensors files and its tokenizer, read and checked before a model is made.

Nothing is downloaded, no pickle is read and no code from the folder runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tutelage.artifacts import ADAPTER, adapter_config, is_adapter, is_scored, tokenizer_folder
from tutelage.errors import ArtifactError
from tutelage.files import check_readable, read_object
from tutelage.gguf.folder import LINK, file_of, header_of, model_folder, source_of
from tutelage.gguf.reader import AGAIN
from tutelage.gguf.weights import GgufTensors
from tutelage.models import families
from tutelage.models.names import Stored
from tutelage.plan.config_json import EXPORT_AGAIN, read_config_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SCORES = ("ForSequenceClassification", "ForTokenClassification")  # ends of the names of classes with a score head
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "tutelage.json",
    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip


def check_folder(folder: Path) -> dict[str, Any]:
    """The configuration of a model folder that another library is to read. Raises `ArtifactError` for what is never read here:
    pickled weights, code of the model's own."""
    raw = read_config(folder)
    if (file := file_of(folder)) is not None:
        raise ArtifactError(
            "a GGUF file is read by our own decoder alone", file=file,
            fix="train from it, or merge an adapter on it: the result is an ordinary model folder",
        )  # fmt: skip
    refuse_code(folder, raw)
    StoredFiles.find(folder)
    return raw


def read_config(folder: Path) -> dict[str, Any]:
    """The object in `folder`/config.json, or of a GGUF file. Raises ArtifactError when `folder` is not a model folder."""
    folder = model_folder(folder)
    path = folder / "config.json"
    fix = "give the folder that holds config.json and model.safetensors"
    if not folder.is_dir():
        raise ArtifactError("there is no such model folder", file=folder, fix=fix)
    if not path.is_file():
        held = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise ArtifactError("not a model folder: config.json is missing", file=folder, found=held, fix=fix)
    raw = read_config_json(path)
    if not isinstance(raw.get("model_type"), str):
        raise ArtifactError(
            "not a model's configuration", file=path, field="model_type", found=raw.get("model_type"),
            expected="an object with a model_type", fix=fix,
        )  # fmt: skip
    return raw


def scores(raw: dict[str, Any]) -> bool:
    """Whether the model of a config.json has a score head in place of a language head."""
    return any(str(name).endswith(SCORES) for name in raw.get("architectures") or ())


def refuse_scorer(folder: Path) -> None:
    """Raises `ArtifactError` for a model, or an adapter, that writes no text."""
    adapted = is_adapter(folder)
    raw = adapter_config(folder) if adapted else read_config(folder)
    if is_scored(folder) or (not adapted and scores(raw)):
        field = "task_type" if adapted else "architectures"
        raise ArtifactError(
            "this model gives scores (a reward model, a classifier) and writes no text",
            file=folder / (ADAPTER if adapted else "config.json"), field=field, found=raw[field],
            expected=f"a language model, such as {'CAUSAL_LM' if adapted else 'a …ForCausalLM'}",
            fix="give the language model; a reward model belongs where a reward is asked for, a classifier is used with "
            "`tutelage predict`",
        )  # fmt: skip


def refuse_code(folder: Path, raw: dict[str, Any]) -> None:
    if raw.get("auto_map"):
        raise ArtifactError(
            "this model runs Python code from its folder, which is never done here", file=folder / "config.json",
            field="auto_map", found=raw["auto_map"],
            fix="use a model of a family that `transformers` knows, or convert it to one",
        )  # fmt: skip


def refuse_quantized(folder: Path, raw: dict[str, Any]) -> None:
    """Raises `ArtifactError` for quantized weights: a library that does not know the method reads them as if they were none."""
    if found := raw.get("quantization_config"):
        method = found.get("quant_method") if isinstance(found, dict) else None
        raise ArtifactError(
            f"the weights of this model are quantized ({method or 'by an unnamed method'}), which is not read here",
            file=folder / "config.json", field="quantization_config", found=found,
            expected="float32, bfloat16 or float16 weights",
            fix="use the original model (adapter.quantize=nf4 trains on it in 4 bits), or a GGUF file of it",
        )  # fmt: skip


def tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """The files of a tokenizer folder (or of a model folder with a tokenizer) that belong to the tokenizer."""
    folder = tokenizer_folder(folder)
    found = tuple(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())
    if not any(f.name in ("tokenizer.json", "tokenizer.model", "vocab.json") for f in found):
        raise ArtifactError("there is no tokenizer in this folder", file=folder, expected="a tokenizer.json")
    return found


def stored_shapes(folder: Path, names: list[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of those of the tensors `names` that the files of `folder` hold."""
    with open_tensors(folder, "", []) as files:
        held = set(files.names())
        return {name: files.shape(name) for name in names if name in held}


class Tensors(Protocol):
    """Stored tensors by the names of the current release of their family."""

    copies: bool  # whether a tensor is already a copy of its own

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def tensor(self, name: str) -> Tensor: ...

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        ...


def open_tensors(folder: Path, prefix: str, wanted: list[Stored]) -> contextlib.AbstractContextManager[Tensors]:
    """The stored tensors of a model folder."""
    if (folder / LINK).is_file():
        return GgufTensors(header_of(folder))
    return StoredFiles.find(folder).open(prefix, wanted)


def weight_map(index: Path) -> dict[str, str]:
    """File names by tensor, from an index of weights. Raises `ArtifactError` for one that names files outside its folder."""
    table = read_object(index, EXPORT_AGAIN).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(file, str) for file in table.values()):
        raise ArtifactError(
            "not a valid index of weights", file=index, field="weight_map", found=table,
            expected='an object with a file for each tensor: {"model.norm.weight": "model-00001-of-00002.safetensors"}',
            fix=EXPORT_AGAIN,
        )  # fmt: skip
    for name, file in table.items():
        if not file or file in (".", "..") or Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise ArtifactError(
                "an index of weights may name only files of its folder", file=index, field=f"weight_map.{name}", found=file,
                expected="the name of a safetensors file, without a folder", fix=EXPORT_AGAIN,
            )  # fmt: skip
    return table


class StoredFiles:
    """The safetensors files of a folder."""

    def __init__(self, folder: Path, where: dict[str, Path] | None) -> None:
        self.folder, self.where = folder, where  # by tensor; None: all in one file

    @classmethod
    def find(cls, folder: Path) -> StoredFiles:
        if (folder / INDEX).is_file():
            table = weight_map(folder / INDEX)
            missing = sorted({f for f in table.values() if not (folder / f).is_file()})
            if missing:
                raise ArtifactError(
                    f"{len(missing)} of {len(set(table.values()))} weight files are missing", file=folder,
                    found=", ".join(missing[:4]), fix="copy the missing files into the folder",
                )  # fmt: skip
            for file in sorted(set(table.values())):
                check_readable(folder / file)
            return cls(folder, {name: folder / file for name, file in table.items()})
        if (folder / WEIGHTS).is_file():
            check_readable(folder / WEIGHTS)
            return cls(folder, None)
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickles:
            raise ArtifactError(
                "the weights are a pickle file, which can run code when it is read; it is not opened", file=folder / pickles[0],
                expected=WEIGHTS,
                fix="convert them where you trust the file: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new)",
            )  # fmt: skip
        raise ArtifactError(
            "the model's weights are missing", file=folder, expected=f"{WEIGHTS} or {INDEX}", fix="copy the whole model folder"
        )

    @contextlib.contextmanager
    def open(self, prefix: str, wanted: list[Stored]) -> Iterator[OpenedFiles]:
        paths = [self.folder / WEIGHTS] if self.where is None else sorted(set(self.where.values()))
        with contextlib.ExitStack() as stack:
            handles = {}
            for path in paths:
                try:
                    handles[path] = stack.enter_context(safe_open(path, framework="pt"))
                except SafetensorError as error:
                    raise ArtifactError(
                        f"a damaged safetensors file ({error})", file=path, fix="export or download the model again"
                    ) from error
            yield OpenedFiles(handles, prefix, {row.name for row in wanted})


class OpenedFiles:
    """Open safetensors files, tensors by the names of the current release of their family."""

    copies = False

    def __init__(self, handles: dict[Path, Any], prefix: str, wanted: set[str]) -> None:
        self.place = {}
        for path, handle in handles.items():
            for key in handle.keys():  # noqa: SIM118 (not a dict)
                name = prefix + key if key not in wanted and prefix and not key.startswith((prefix, "lm_head.")) else key
                self.place[name] = (path, handle, key)

    def names(self) -> list[str]:
        return list(self.place)

    def shape(self, name: str) -> tuple[int, ...]:
        _, handle, key = self.place[name]
        return tuple(handle.get_slice(key).get_shape())

    def tensor(self, name: str) -> Tensor:
        _, handle, key = self.place[name]
        return handle.get_tensor(key)  # type: ignore[no-any-return]

    def file(self, name: str) -> Path:
        return self.place[name][0]


def check_tensors(files: Tensors, folder: Path, wanted: list[Stored], shapes: dict[str, torch.Size], tied: bool) -> None:
    """Every tensor there, of its shape, and no other."""
    folder, held = source_of(folder), set(files.names())
    missing = [row.name for row in wanted if row.name not in held]
    fix = "config.json and the weights have to be of the same model" if folder.is_dir() else AGAIN
    if missing:
        raise ArtifactError(
            f"{len(missing)} of {len(wanted)} tensors are missing from the model's weights", file=folder,
            found=f"no {', '.join(missing[:3])}", fix=fix,
        )  # fmt: skip
    for row in wanted:
        found, expected = files.shape(row.name), row.shape(shapes)
        if found != expected:
            raise ArtifactError(
                "a tensor has another shape than the model's configuration says", file=files.file(row.name), field=row.name,
                found=list(found), expected=str(list(expected)), fix=fix,
            )  # fmt: skip
    known = {row.name for row in wanted} | ({"lm_head.weight"} if tied else set())
    extra = [n for n in held if n not in known and not n.endswith(families.recomputed())]
    if extra:
        raise ArtifactError(
            f"{len(extra)} tensors in the model's weights belong to nothing in its configuration", file=folder,
            found=", ".join(sorted(extra)[:3]), fix=fix,
        )  # fmt: skip
