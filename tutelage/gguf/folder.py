"""GGUF files as model folders.

A file is opened into a folder with what the rest of the package reads: config.json, generation_config.json, the tokenizer's files
and the chat template. The weights stay where they are: `gguf.json` names the file. The folder is kept for the next time, in
`$XDG_CACHE_HOME/tutelage/gguf` or the same below `~/.cache`. Imports without torch.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from tutelage import log
from tutelage.errors import ArtifactError, StorageError
from tutelage.files import read_json, whole_folder, write_json
from tutelage.gguf import reader
from tutelage.gguf.architecture import config_of
from tutelage.gguf.reader import Gguf, is_gguf
from tutelage.gguf.tokenizer import Vocabulary, chat_template, tokenizer_config, tokenizer_json

LINK = "gguf.json"
FORMAT = 1  # of the folders: another number makes them anew


def model_folder(path: Path | str) -> Path:
    """The folder to read a model from: `path` itself; of a GGUF file, or the short name of one in a package, that into which it
    is opened. Where `path` exists it is never a short name.

    Raises `ArtifactError` for a GGUF file that can't be read, and for the short name of a package that is not there.
    """
    path = Path(path).expanduser()
    if is_gguf(path):
        return _opened(path.absolute())
    if not path.exists() and (found := packaged(str(path))) is not None:
        return _opened(found)
    return path


def file_of(folder: Path) -> Path | None:
    """The GGUF file that a folder was opened from; None for any other folder."""
    return Path(read_json(folder / LINK)["file"]) if (folder / LINK).is_file() else None


def source_of(folder: Path) -> Path:
    """What a person would name to get this folder again: the GGUF file, or the folder itself."""
    return file_of(folder) or folder


def reference_to(folder: Path) -> str:
    """What another folder writes down to find this one again: a short name where the file is a package's, else a whole path."""
    file = file_of(folder)
    if file is None:
        return str(folder.resolve())
    return next((name for name in short_names() if _installed(name) == file), str(file))


def header_of(folder: Path) -> Gguf:
    """The header of the GGUF file behind a folder. Raises `ArtifactError` where the file is gone or is another now."""
    link = read_json(folder / LINK)
    path = Path(link["file"])
    if not path.is_file():
        raise ArtifactError("the GGUF file is not there any more", file=path, fix="put it back, or name another")
    if _state(path) != {"size": link["size"], "modified": link["modified"]}:
        raise ArtifactError("the GGUF file was changed after it was opened", file=path, fix="run the same command again")
    return reader.read(path)


# Short names


@cache
def _packages() -> dict[str, dict[str, str]]:
    table: dict[str, dict[str, str]] = yaml.safe_load(
        files("tutelage.gguf").joinpath("packages.yaml").read_text(encoding="utf-8")
    )
    return table


def short_names() -> tuple[str, ...]:
    """Short names of models in packages."""
    return tuple(_packages())


def packaged(name: str) -> Path | None:
    """The GGUF file that a short name stands for; None for what is no short name. Raises `ArtifactError` where the package, or
    the file in it, is missing."""
    if name not in short_names():
        return None
    found, row = _installed(name), _packages()[name]
    if found is None:
        spec = importlib.util.find_spec(row["module"])
        raise ArtifactError(
            f"the model `{name}` is in the package {row['package']}, which "
            + ("is not installed" if spec is None else f"lacks its file {row['file']}"),
            file=name,
            fix=row["install"] + ("" if spec is None else " --force-reinstall"),
        )
    return found


def _installed(name: str) -> Path | None:
    """The file of a short name, if it is there. The package is looked up, not imported."""
    row = _packages()[name]
    spec = importlib.util.find_spec(row["module"])
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (file := Path(place) / row["file"]).is_file():
            return file.absolute()
    return None


# Folders


def _state(path: Path) -> dict[str, int]:
    found = path.stat()
    return {"size": found.st_size, "modified": found.st_mtime_ns}


def _opened(path: Path) -> Path:
    """The folder of a file, made where it is not there yet."""
    link = {"file": str(path), **_state(path), "format": FORMAT}
    key = hashlib.sha256(json.dumps(link, sort_keys=True).encode()).hexdigest()[:16]
    name = next((short for short in short_names() if _installed(short) == path), path.stem)
    for root in (_cache_folder(), _temporary):
        folder = (root if isinstance(root, Path) else root()) / key / name
        if (folder / LINK).is_file():
            return folder
        try:
            _write(path, folder, link)
            return folder
        except (StorageError, OSError):
            if not isinstance(root, Path):
                raise
            log.say(f"{root} cannot be written to: {path.name} is opened into a temporary folder", style="dim")
    raise AssertionError("one of the two returns or raises")


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tutelage" / "gguf"


@cache
def _temporary() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="tutelage-gguf-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _write(path: Path, folder: Path, link: dict[str, Any]) -> None:
    file = reader.read(path)
    config, words = config_of(file), Vocabulary.of(file)
    ids = {f"{name}_token_id": words.id_of(theirs) for name, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}
    config |= ids
    described = tokenizer_json(words)
    template = chat_template(file)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(folder) as out:
        write_json(out / "config.json", config)
        stops = {"eos_token_id": words.stop_ids} if words.stop_ids else {}
        write_json(out / "generation_config.json", {k: v for k, v in {**ids, **stops}.items() if v is not None})
        (out / "tokenizer.json").write_text(json.dumps(described, ensure_ascii=False), encoding="utf-8")
        write_json(out / "tokenizer_config.json", tokenizer_config(words, int(config["max_position_embeddings"])))
        if template is not None:
            (out / "chat_template.jinja").write_text(template, encoding="utf-8")
        write_json(out / LINK, link)
