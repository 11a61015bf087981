"""The run directory: one folder a run, its lock, its parents, its digest, and `DONE`, written last.

    runs/<recipe>/<name>-<digest>/
        run.json  config.yaml  records/ | tokenizer/ | tokens/ | model/ | …  checkpoints/  metrics.jsonl  samples/  logs/  DONE

A run lives under its final name from the start, held by a lock. Everything in it appears whole. Only `DONE` makes it usable.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from tutelage import __version__, log
from tutelage.bases import is_adapter
from tutelage.errors import ArtifactError, StorageError, UserError
from tutelage.files import file_digest, folder_digest, read_json, recover, storage_errors, whole_file, write_json
from tutelage.gguf.folder import model_folder, packaged, short_names
from tutelage.gguf.reader import is_gguf

KINDS = {
    # kind of artifact: the file that proves a folder to be one
    "records": "schema.json",
    "tokenizer": "tokenizer.json",
    "tokens": "tokens.json",
    "model": "config.json",
    "adapter": "adapter_config.json",
    "scores": "scores.json",
    "report": "report.html",
}


@dataclass(frozen=True, slots=True)
class Artifact:
    """A finished folder that a stage reads."""

    kind: str  # a key of KINDS, or "run"
    path: Path
    digest: str  # SHA-256 of the content
    run: Path | None = None  # the run directory that it lies in, if it lies in one
    file: Path | None = None  # the GGUF file that `path` was opened from

    @property
    def name(self) -> str:
        """What clients call it: the stage's name in its recipe, or the folder's."""
        return self.run.name.rpartition("-")[0] if self.run else self.path.resolve().name


@dataclass(slots=True)
class RunDir:
    """A run being made or finished. `facts` are the stage's own numbers; they end in run.json."""

    path: Path
    stage: str
    digest: str
    inputs: dict[str, Artifact] = field(default_factory=dict)
    seed: int = 0
    nested: Callable[[str, dict[str, Any]], RunDir] | None = None  # runs a stage that this one needs

    def folder(self, name: str) -> Path:
        return self.path / name

    def input(self, name: str) -> Path:
        """The folder of an input artifact."""
        return self.inputs[name].path

    @property
    def recipe(self) -> str:
        return self.path.parent.name

    @property
    def root(self) -> Path:
        return self.path.parent.parent

    @property
    def done(self) -> bool:
        return (self.path / "DONE").exists()

    @property
    def facts(self) -> dict[str, Any]:
        return dict(read_json(self.path / "run.json"))

    def clear(self) -> None:
        """Removes everything but the logs."""
        for item in self.path.iterdir() if self.path.exists() else ():
            if item.name not in (".lock", "logs"):
                shutil.rmtree(item) if item.is_dir() else item.unlink()

    @contextlib.contextmanager
    def attempt(self, config: dict[str, Any], fresh: bool = False) -> Iterator[dict[str, Any]]:
        """Holds the lock, keeps run.json's status true, logs to `logs/attempt_N.log`. The block fills the facts it is given;
        when it ends well `DONE` is written. `fresh` removes what an earlier attempt made. `StorageError` if another process
        holds the run."""
        with storage_errors(self.path), self._lock():
            if log.rank() == 0:
                if fresh:
                    self.clear()
                self._sweep()
            number = len(list((self.path / "logs").glob("attempt_*.log"))) + 1
            log.to_file(self.path / "logs" / f"attempt_{number}.log")
            started = time.time()
            facts: dict[str, Any] = {}
            if log.rank() == 0:
                with whole_file(self.path / "config.yaml") as f:
                    yaml.safe_dump(config, f, sort_keys=False, allow_unicode=True)
            self._write("running", started, {})
            try:
                yield facts
            except KeyboardInterrupt:
                self._write("interrupted", started, facts)
                log.say("interrupted; the same command again resumes")
                raise
            except Exception as error:
                self._write("failed", started, {**facts, "error": str(error)})
                if not isinstance(error, UserError):
                    log.say(f"{type(error).__name__}: {error}")
                raise
            else:
                self._write("done", started, facts)
                if log.rank() == 0:
                    with whole_file(self.path / "DONE") as f:
                        f.write(f"{self.digest}\n")
            finally:
                log.close_file()

    def _sweep(self) -> None:
        """Removes the half-written files that a killed attempt left behind, and puts back what it had set aside."""
        for folder in (self.path, *(p for p in self.path.glob("*") if p.is_dir())):
            for item in folder.glob(".*.partial-*"):
                shutil.rmtree(item) if item.is_dir() else item.unlink()
            for old in folder.glob(".*.old-*"):
                recover(old.with_name(old.name[1:].rpartition(".old-")[0]))

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (NotADirectoryError, FileExistsError, FileNotFoundError) as error:
            raise StorageError(
                "cannot make the run directory there", file=self.path, found=error.strerror, fix="choose a folder with --runs"
            ) from None
        if log.rank() != 0:  # rank 0 holds the lock for all
            yield
            return
        with (self.path / ".lock").open("w") as f:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StorageError(
                    "this run is being made by another process", file=self.path, fix="wait for it, or stop it"
                ) from None
            yield  # a killed process loses its lock by itself

    def _write(self, status: str, started: float, facts: dict[str, Any]) -> None:
        if log.rank() != 0:
            return
        old = read_json(self.path / "run.json") if (self.path / "run.json").exists() else {}
        made = next((k for k, proof in KINDS.items() if (self.path / k / proof).exists()), None)
        before = float(old.get("seconds", 0.0)) if old.get("status") in ("interrupted", "running") else 0.0
        row: dict[str, Any] = {
            "stage": self.stage,
            "name": self.path.name.rsplit("-", 1)[0],
            "status": status,
            "digest": self.digest,
            "seed": self.seed,
            "parents": [
                {
                    "name": n,
                    "kind": a.kind,
                    "stage": _stage_of(a),
                    "path": _relative(a.run or a.file or a.path, self.path),
                    "digest": a.digest,
                }
                for n, a in self.inputs.items()
            ],
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(started)),
            "seconds": round(before + time.time() - started, 2),
            "command": shlex.join(sys.argv),
            "commit": _commit(),
            "versions": versions(),
            "machine": machine(),
            **facts,
        }
        if status == "done" and made:
            row["artifact"] = {"kind": made, "path": made, "digest": folder_digest(self.path / made)}
        write_json(self.path / "run.json", row)


def _relative(path: Path, base: Path) -> str:
    return os.path.relpath(path.resolve(), base.resolve())


def _stage_of(artifact: Artifact) -> str | None:
    """The stage that made an input; None for a folder from outside."""
    return str(read_json(artifact.run / "run.json")["stage"]) if artifact.run else None


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
    wanted = KINDS.get(kind)
    if kind in ("model", "tokenizer") and not (path / str(wanted)).exists() and is_adapter(path):
        wanted = KINDS["adapter"]  # a base and what is beside it are a model too
    if wanted and (path / wanted).exists():
        inside = path.resolve().parent
        run = inside if (inside / "run.json").exists() else None
        return Artifact(kind, path, folder_digest(path), run)
    models = sorted(path.glob("*.gguf")) if kind in ("model", "tokenizer") and path.is_dir() else []
    raise ArtifactError(
        f"not a {kind} folder: it has no {wanted or 'run.json'}", file=path, found=_contents(path),
        fix=f"give the GGUF file itself: {models[0]}" if models else _how_to_make(kind),
    )  # fmt: skip


def _of_gguf(file: Path, kind: str) -> Artifact:
    return Artifact(kind, model_folder(file), file_digest(file), file=file)


def _of_run(path: Path, kind: str) -> Artifact:
    row = read_json(path / "run.json")
    if not (path / "DONE").exists():
        raise ArtifactError(
            f"this run is not finished (status: {row.get('status')})", file=path, fix="run the same command again: it resumes"
        )
    if kind == "run":
        return Artifact("run", path, row["digest"], path)
    made = row.get("artifact", {})
    if made and not (path / made["path"]).is_dir():
        raise ArtifactError(
            f"this run has lost its {made['kind']}", file=path / made["path"], fix="make it again: the same command with --force"
        )
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


def all_runs(root: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Every run below `root` with its run.json, oldest first."""
    rows = [(p.parent, read_json(p)) for p in root.glob("*/*/run.json")]
    return sorted(rows, key=lambda row: str(row[1].get("started")))


def held(path: Path) -> bool:
    """True while a process holds the run's lock."""
    lock = path / ".lock"
    if not lock.exists():
        return False
    with lock.open("rb") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def versions() -> dict[str, str]:
    """Versions that can change a result."""
    out = {"tutelage": __version__, "python": platform.python_version()}
    for name in ("torch", "numpy", "tokenizers", "safetensors"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            out[name] = metadata.version(name)
    return out


def machine() -> dict[str, Any]:
    return {"host": platform.node(), "system": f"{platform.system()} {platform.machine()}", "cores": os.cpu_count()}


def _commit() -> str | None:
    """The commit of this package's checkout, with a + when it has changes; None outside one."""
    folder = Path(__file__).parent.parent
    if not (folder / ".git").exists():  # installed; a repository further up is somebody else's
        return None
    try:
        head = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=5
        )
        if head.returncode:
            return None
        dirty = subprocess.run(
            ["git", "-C", str(folder), "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def lineage(path: Path) -> list[tuple[int, str, Path, dict[str, Any]]]:
    """The chain behind a run, depth first: (depth, name of the input, run directory, its run.json)."""

    def walk(folder: Path, name: str, depth: int) -> Iterator[tuple[int, str, Path, dict[str, Any]]]:
        if not (folder / "run.json").exists():
            raise ArtifactError("not a run directory: it has no run.json", file=folder)
        row = read_json(folder / "run.json")
        yield depth, name, folder, row
        for parent in row["parents"]:
            inner = (folder / parent["path"]).resolve()
            if (inner / "run.json").exists():
                yield from walk(inner, parent["name"], depth + 1)
            else:
                yield (
                    depth + 1,
                    parent["name"],
                    inner,
                    {"stage": parent["kind"], "status": "outside", "digest": parent["digest"], "parents": []},
                )

    return list(walk(path, "run", 0))
