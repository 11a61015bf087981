"""What a reference names: a folder, a run, `recipe/stage`, a GGUF file, or the short name of one in a package."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from tutelage.artifacts import is_adapter
from tutelage.errors import ArtifactError
from tutelage.files import file_digest, folder_digest
from tutelage.gguf.folder import model_folder, packaged, short_names
from tutelage.gguf.reader import is_gguf
from tutelage.rundir import ARTIFACT_TYPES, Artifact, finished, read_run, whole


def matching(reference: str, root: Path, proof: str) -> list[Path]:
    """Runs below `root` that `recipe/stage` or `stage-digest` names and that hold the file `proof`, oldest first."""
    if not re.fullmatch(r"[\w-]+(/[\w-]+)?", reference):
        return []
    digits = "[0-9a-f]" * 12
    found = [
        *root.glob(f"{reference}-{digits}/{proof}"),
        *root.glob(f"{reference}/{proof}"),
        *root.glob(f"*/{reference}/{proof}"),
    ]
    return [p.parent for p in sorted(found, key=lambda p: p.stat().st_mtime)]


def find(reference: str, kind: str, root: Path) -> Artifact:
    """The artifact that a reference names: a folder, a run's directory, `recipe/stage`, a GGUF file, or the short name of one in
    a package. Raises `ArtifactError` saying what is there instead."""
    path = Path(reference).expanduser()
    if kind in ("model", "tokenizer") and is_gguf(path):
        return _of_gguf(path, kind)
    if not path.exists():
        matches = matching(reference, root, "DONE")
        if not matches and kind in ("model", "tokenizer") and (file := packaged(reference)) is not None:
            return _of_gguf(file, kind)
        if not matches:
            unfinished = matching(reference, root, "run.json")
            if unfinished:
                return _of_run(unfinished[-1], kind)
            raise ArtifactError(
                f"no {kind} there",
                file=reference,
                fix=f"give a folder, or a finished run as recipe/stage (`tutelage runs --runs {root}` lists them"
                + ("; `tutelage run recipes/quickstart.yaml` makes this one)" if reference.startswith("quickstart/") else ")")
                + (f"; a GGUF file, or {_quoted(short_names())}" if kind in ("model", "tokenizer") else ""),
            )
        path = matches[-1]
    if (path / "run.json").exists():
        return _of_run(path, kind)
    wanted = ARTIFACT_TYPES.get(kind)
    if kind in ("model", "tokenizer") and not (path / str(wanted)).exists() and is_adapter(path):
        wanted = ARTIFACT_TYPES["adapter"]  # a base and what is beside it are a model too
    if wanted and (path / wanted).exists():
        inside = path.resolve().parent
        run = inside if (inside / "run.json").exists() else None
        return Artifact(kind, path, _known(path, run) or folder_digest(path), run)
    models = sorted(path.glob("*.gguf")) if kind in ("model", "tokenizer") and path.is_dir() else []
    raise ArtifactError(
        f"not a {kind} folder: it has no {wanted or 'run.json'}", file=path, found=_contents(path),
        fix=f"give the GGUF file itself: {models[0]}" if models else _how_to_make(kind),
    )  # fmt: skip


def _of_gguf(file: Path, kind: str) -> Artifact:
    return Artifact(kind, model_folder(file), file_digest(file), file=file)


def _known(path: Path, run: Path | None) -> str | None:
    """The digest of a folder that a finished run made, and that is as it was made."""
    if run is None or not finished(run):
        return None
    row = read_run(run)
    made = row.get("artifact") or {}
    return whole(run, row) if made.get("path") == path.resolve().name else None


def _of_run(path: Path, kind: str) -> Artifact:
    row = read_run(path)
    if not finished(path):
        raise ArtifactError(
            f"this run is not finished (status: {row.get('status')})", file=path, fix="run the same command again: it resumes"
        )
    if kind == "run":
        return Artifact("run", path, row["digest"], path)
    made = row.get("artifact") or {}
    whole(path, row)
    if made.get("kind") == kind or (made.get("kind"), kind) == ("adapter", "model"):
        return Artifact(kind, path / made["path"], made["digest"], path)
    if kind == "tokenizer" and made.get("kind") in ("model", "adapter") and (path / made["path"] / "tokenizer.json").exists():
        return Artifact(kind, path / made["path"], made["digest"], path)
    raise ArtifactError(f"this run made {made.get('kind', 'nothing')}, not {kind}", file=path, fix=_how_to_make(kind))


def _contents(path: Path) -> str:
    names = sorted(p.name for p in path.iterdir())[:8] if path.is_dir() else ["a file"]
    return ", ".join(names) or "an empty folder"


def _quoted(names: Iterable[str]) -> str:
    return " or ".join(f"`{name}`" for name in names)


def _how_to_make(kind: str) -> str | None:
    return {
        "records": "make one with `tutelage data --sources YOUR_FILES`",
        "tokenizer": "make one with `tutelage tokenizer --data RECORDS`, or give a Hugging Face folder with tokenizer.json",
        "run": "give a finished run as recipe/stage, or its folder (`tutelage runs` lists them)",
        "model": "give a Hugging Face model folder, a GGUF file, a finished pretrain or sft run, or " + _quoted(short_names()),
        "adapter": "give a folder that peft wrote, or a finished run with adapter.kind set",
    }.get(kind)
