"""Loads a Hugging Face model folder: our decoder where the family is ours, else `transformers` behind the same interface.

Nothing is downloaded, no pickle is read, no code from the folder runs, and for our families `transformers` is not imported.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tutelage.artifacts import ADAPTER, adapter_config, is_adapter, is_scored
from tutelage.errors import ArtifactError
from tutelage.files import check_readable, read_object
from tutelage.gguf.folder import LINK, file_of, header_of, model_folder, source_of
from tutelage.gguf.reader import AGAIN
from tutelage.gguf.weights import GgufTensors
from tutelage.models import families
from tutelage.models.config import DecoderConfig, check_vocabulary, unsupported
from tutelage.models.decoder import Decoder
from tutelage.models.interface import Model
from tutelage.models.names import Stored, stored
from tutelage.models.unfilled import unfilled
from tutelage.plan.config_json import EXPORT_AGAIN, read_config_json

__all__ = ["check_folder", "check_vocabulary", "load", "read_config"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SCORES = ("ForSequenceClassification", "ForTokenClassification")  # ends of the names of classes with a score head


def load(
    folder: Path | str, *, device: str | torch.device = "cpu", dtype: str | torch.dtype = "float32", adapter: bool = True
) -> Model:
    """The model of `folder`, in evaluation mode, its weights copied to `device` as `dtype`. Of an adapter's folder it is the base
    that the folder names, with the adapter. A GGUF file, or the short name of one in a package, is a model's folder too.

    A model that is not of our families runs on `transformers` (extra `hf`), unless `adapter` is off.
    Raises ArtifactError for a folder that is not a model, and for weights that are missing or of another shape.
    """
    folder = model_folder(folder)
    kind = DTYPES[dtype] if isinstance(dtype, str) else dtype
    if is_adapter(folder):
        from tutelage.models.adapters.start import load_with_base

        refuse_scorer(folder)

        return load_with_base(folder, device=torch.device(device), dtype=kind)  # type: ignore[no-any-return]
    refuse_scorer(folder)
    raw = read_config(folder)
    reason = unsupported(raw)
    if reason is None:
        return _load_decoder(folder, raw, torch.device(device), kind)
    _refuse_code(folder, raw)
    if not adapter:
        raise ArtifactError(f"our decoder does not run this model: {reason}", file=folder / "config.json")
    _Files.find(folder)
    from tutelage.models.hf.causal import load_hf

    return load_hf(folder, device=torch.device(device), dtype=kind)


def check_folder(folder: Path) -> dict[str, Any]:
    """The configuration of a model folder that another library is to read. Raises `ArtifactError` for what is never read here:
    pickled weights, code of the model's own."""
    raw = read_config(folder)
    if (file := file_of(folder)) is not None:
        raise ArtifactError(
            "a GGUF file is read by our own decoder alone", file=file,
            fix="train from it, or merge an adapter on it: what comes of it is an ordinary model folder",
        )  # fmt: skip
    _refuse_code(folder, raw)
    _Files.find(folder)
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
    worn = is_adapter(folder)
    raw = adapter_config(folder) if worn else read_config(folder)
    if is_scored(folder) or (not worn and scores(raw)):
        field = "task_type" if worn else "architectures"
        raise ArtifactError(
            "this model gives scores (a reward model, a classifier) and writes no text",
            file=folder / (ADAPTER if worn else "config.json"), field=field, found=raw[field],
            expected=f"a language model, such as {'CAUSAL_LM' if worn else 'a …ForCausalLM'}",
            fix="give the language model; a reward model belongs where a reward is asked for, a classifier is used with "
            "`tutelage predict`",
        )  # fmt: skip


def _refuse_code(folder: Path, raw: dict[str, Any]) -> None:
    if raw.get("auto_map"):
        raise ArtifactError(
            "this model runs Python code from its folder, which is never done here", file=folder / "config.json",
            field="auto_map", found=raw["auto_map"],
            fix="use a model of a family that `transformers` knows, or convert it to one",
        )  # fmt: skip


def _load_decoder(folder: Path, raw: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Decoder:
    config = DecoderConfig.from_hf(raw, folder / "config.json")
    with unfilled():
        model = Decoder(config).to(dtype)
    fill(model, folder, config, device, dtype)
    model.tie()
    return model.eval()


def fill(model: nn.Module, folder: Path, config: DecoderConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Gives a model of our families, which may be on "meta", the weights of `folder`: all there are, and no others."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    disk = families.family(config.model_type).disk
    wanted = stored(disk, list(shapes))
    with _open(folder, disk.prefix, wanted) as files:
        _check(files, folder, wanted, shapes, tied=config.tie_word_embeddings)
        state: dict[str, Tensor] = {}
        for row in wanted:
            for name, part in row.split(files.tensor(row.name), shapes):
                # A copy of its own: a view of the mapped file would change or vanish with the file.
                state[name] = part.to(device, dtype, copy=not files.copies, memory_format=torch.contiguous_format)
    model.load_state_dict(state, strict=False, assign=True)


def stored_shapes(folder: Path, names: list[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of those of the tensors `names` that the files of `folder` hold."""
    with _open(folder, "", []) as files:
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


def _open(folder: Path, prefix: str, wanted: list[Stored]) -> contextlib.AbstractContextManager[Tensors]:
    """The stored tensors of a model folder."""
    if (folder / LINK).is_file():
        return GgufTensors(header_of(folder))
    return _Files.find(folder).open(prefix, wanted)


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
                "an index of weights names files of its own folder only", file=index, field=f"weight_map.{name}", found=file,
                expected="the name of a safetensors file, without a folder", fix=EXPORT_AGAIN,
            )  # fmt: skip
    return table


class _Files:
    """The safetensors files of a folder."""

    def __init__(self, folder: Path, where: dict[str, Path] | None) -> None:
        self.folder, self.where = folder, where  # by tensor; None: all in one file

    @classmethod
    def find(cls, folder: Path) -> _Files:
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
    def open(self, prefix: str, wanted: list[Stored]) -> Iterator[_Opened]:
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
            yield _Opened(handles, prefix, {row.name for row in wanted})


class _Opened:
    """Open safetensors files."""

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


def _check(files: Tensors, folder: Path, wanted: list[Stored], shapes: dict[str, torch.Size], tied: bool) -> None:
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
