"""Which model an adapter's folder is for. Without torch: the plan asks too."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from tutelage.errors import ArtifactError
from tutelage.files import file_digest, read_object
from tutelage.gguf.folder import file_of, model_folder

ADAPTER = "adapter_config.json"
SCORED = ("SEQ_CLS", "TOKEN_CLS")  # the tasks of `peft` with a score head


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER).is_file() and not (folder / "config.json").is_file()


def is_scored(folder: Path) -> bool:
    """Whether a folder is that of an adapter under a score head (a reward model, a classifier)."""
    return is_adapter(folder) and adapter_config(folder).get("task_type") in SCORED


def adapter_config(folder: Path) -> dict[str, Any]:
    """The object of adapter_config.json. Raises `ArtifactError`."""
    path = folder / ADAPTER
    if not path.exists():
        raise ArtifactError(f"not an adapter's folder: {ADAPTER} is missing", file=folder)
    return read_object(path)


def base_of(folder: Path) -> Path:
    """The folder of the base that an adapter is for: what its settings name (a folder, a GGUF file or a short name), or the
    model that the run which wrote it had.

    Raises `ArtifactError` where neither is there.
    """
    named = str(adapter_config(folder).get("base_model_name_or_path") or "")
    if named and (here := model_folder(named)).is_dir():
        return here
    run = folder.resolve().parent
    parents = read_object(run / "run.json").get("parents") if (run / "run.json").is_file() else None
    known = [p for p in parents if isinstance(p, dict)] if isinstance(parents, list) else []
    for parent in (p for p in known if p.get("name") == "model" and isinstance(p.get("path"), str)):
        place = model_folder((run / parent["path"]).resolve())
        for found in (place / "model", place / "adapter", place):
            if (found / "config.json").is_file():
                return found
            if is_adapter(found):
                return base_of(found)
    raise ArtifactError(
        "the base of this adapter is not there", file=folder / ADAPTER, field="base_model_name_or_path", found=named or None,
        expected="the folder of the model that it was trained on", fix="put the base there, or write its new place into the file",
    )  # fmt: skip


def whole_of(folder: Path) -> Path:
    """The model folder with the config.json of a model: that of the base, for an adapter; the opened one, for a GGUF file."""
    folder = model_folder(folder)
    return whole_of(base_of(folder)) if is_adapter(folder) else folder


def tokenizer_folder(folder: Path) -> Path:
    """The folder with a model's tokenizer: the base's, for an adapter without one, as `peft` writes them."""
    folder = model_folder(folder)
    own = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    return folder if own or not is_adapter(folder) else tokenizer_folder(base_of(folder))


def weights_digest(base: Path) -> str:
    """SHA-256 over the files with a model's weights; of an adapter over its base's and its own."""
    total = hashlib.sha256()
    if is_adapter(base):
        total.update(weights_digest(base_of(base)).encode())
    opened = file_of(base)
    for file in sorted(base.glob("*.safetensors")) if opened is None else (opened,):
        total.update(f"{file.name} {file_digest(file)}\n".encode())
    return total.hexdigest()
