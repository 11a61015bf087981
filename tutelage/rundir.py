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
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from tutelage import __version__, aside, log
from tutelage.digests import Digests
from tutelage.errors import ArtifactError, StorageError, UserError
from tutelage.files import joint_digest, read_object, recover, storage_errors, whole_file, write_json
from tutelage.unicode import printable

ARTIFACT_TYPES = {
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
        """Whether it is finished, and what it made is there and whole."""
        return self.finished and self.fault() is None

    @property
    def finished(self) -> bool:
        """Whether it ended well, whatever has become of its result since."""
        return finished(self.path)

    def fault(self) -> ArtifactError | None:
        """What is wrong with the result of a finished run; None where it is whole."""
        try:
            whole(self.path, read_run(self.path))
        except ArtifactError as error:
            return error
        return None

    @property
    def facts(self) -> dict[str, Any]:
        return read_run(self.path)

    def clear(self) -> None:
        """Removes everything but the logs."""
        if self.path.exists():
            aside.clear(self.path)

    @contextlib.contextmanager
    def attempt(self, config: dict[str, Any], fresh: bool = False) -> Iterator[dict[str, Any]]:
        """Holds the lock, keeps run.json's status true, logs to `logs/attempt_N.log`. The block fills the facts it is given;
        when it ends well `DONE` is written. `fresh` starts over: a finished result is set aside until the new one is whole, and
        comes back if the attempt fails. `StorageError` if another process holds the run."""
        with storage_errors(self.path), self._lock():
            if log.rank() == 0:
                self._begin(fresh)
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
                log.say(f"interrupted; the same command{' without --force' if fresh else ' again'} resumes")
                raise
            except Exception as error:
                self._write("failed", started, {**facts, "error": str(error)})
                if not isinstance(error, UserError):
                    log.say(f"{type(error).__name__}: {error}")
                self._undo()
                raise
            else:
                self._write("done", started, facts)
                if log.rank() == 0:
                    with whole_file(self.path / "DONE") as f:
                        f.write(f"{self.digest}\n")
                    aside.drop(self.path)
            finally:
                log.close_file()

    def _begin(self, fresh: bool) -> None:
        """Makes the folder ready for an attempt. Whatever happens from here on, it is not finished before `DONE` is written."""
        aside.put_back(self.path, aside.MOVING)
        if fresh and self.finished:
            aside.set_aside(self.path)
        elif fresh:
            self.clear()
        (self.path / "DONE").unlink(missing_ok=True)
        self._sweep()

    def _undo(self) -> None:
        """After a failed attempt: the result that it was to replace comes back."""
        if log.rank() == 0 and (self.path / aside.OLD).is_dir():
            self.clear()
            aside.put_back(self.path)
            log.say("the attempt failed: the result from before --force is in its place again", style="yellow")

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
        old = _earlier(self.path)
        made = next((k for k, proof in ARTIFACT_TYPES.items() if (self.path / k / proof).exists()), None)
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
            "command": printable(shlex.join(sys.argv), lines=True),
            "commit": _commit(),
            "versions": versions(),
            "machine": machine(),
            **facts,
        }
        if status == "done" and made:
            row["artifact"] = {"kind": made, "path": made, "digest": self._digest(made)}
        write_json(self.path / "run.json", row)

    def _digest(self, made: str) -> str:
        """The digest of what was made, which is remembered with those of its files."""
        digests = Digests(self.path / DIGESTS, {}, {})
        found = digests.of(self.path / made)
        digests.keep_made(found)
        return joint_digest(found)


DIGESTS = ".digests.json"
AGAIN = "run its command again: what is not whole is made anew"
NEEDED = {"stage": str, "status": str, "digest": str, "parents": list}  # what every run.json has
OPTIONAL: dict[str, Any] = {"seconds": (int, float), "started": str, "name": str, "error": str}
OF_PARENT = {"name": str, "kind": str, "path": str, "digest": str}


def read_run(path: Path) -> dict[str, Any]:
    """The object in the run.json of a run directory. Raises `ArtifactError` for one that is damaged, or not there."""
    file = path / "run.json"
    if not file.exists():
        raise ArtifactError("not a run directory: it has no run.json", file=path, fix="`tutelage runs` lists the runs")
    row = read_object(file, AGAIN)
    lacks = [key for key, kind in NEEDED.items() if not isinstance(row.get(key), kind)]
    lacks += [key for key, kind in OPTIONAL.items() if row.get(key) is not None and not isinstance(row[key], kind)]
    parents = row["parents"] if "parents" not in lacks else []
    lacks += [
        f"parents.{i}.{key}"
        for i, parent in enumerate(parents)
        for key, kind in OF_PARENT.items()
        if not (isinstance(parent, dict) and isinstance(parent.get(key), kind))
    ]
    made = row.get("artifact")
    if made is not None and not (
        isinstance(made, dict) and made.get("path") in ARTIFACT_TYPES and isinstance(made.get("digest"), str)
    ):
        lacks.append("artifact")
    if lacks:
        raise ArtifactError("this run.json is damaged", file=file, field=lacks[0], expected="as a stage wrote it", fix=AGAIN)
    return row


def finished(path: Path) -> bool:
    """Whether a run ended well: `DONE` alone, in a run that did not, says nothing."""
    if not (path / "DONE").exists():
        return False
    try:
        return read_run(path)["status"] == "done"
    except ArtifactError:
        return False


def _earlier(path: Path) -> dict[str, Any]:
    """What the last attempt wrote into run.json."""
    try:
        return read_run(path) if (path / "run.json").exists() else {}
    except ArtifactError as error:
        log.say(f"{error.file}: {error.message}; it is written anew", style="yellow")
        return {}


def whole(path: Path, row: dict[str, Any]) -> str | None:
    """The digest of what a finished run made, compared with its content; None for a run that made nothing. Raises `ArtifactError`
    where it is gone or is not what was made. Content is read again only where a file has changed (see `digests`)."""
    made = row.get("artifact")
    if made is None:
        return None
    folder = path / made["path"]
    if not folder.is_dir():
        raise ArtifactError(f"this run has lost its {made['kind']}", file=folder, fix=f"{AGAIN}; or copy it back")
    digests = Digests.open(path / DIGESTS)
    found = digests.of(folder)
    if joint_digest(found) == made["digest"]:
        digests.keep_made(found)
        return str(made["digest"])
    before = digests.made if joint_digest(digests.made) == made["digest"] else {}
    lost = [name for name in before if name not in found]
    changed = [name for name in before if name in found and found[name] != before[name]]
    extra = [name for name in found if before and name not in before]
    parts = [f"{what}: {', '.join(names[:3])}" for what, names in (("lost", lost), ("changed", changed), ("new", extra)) if names]
    name = next(iter([*lost, *changed, *extra]), "")
    raise ArtifactError(
        f"this run's {made['kind']} changed after the run", file=folder / name,
        found="; ".join(parts) or f"content with the digest {joint_digest(found)[:12]}",
        expected=f"content with the digest {made['digest'][:12]}, as in run.json",
        fix=f"{AGAIN}; or copy the file back. A version that was edited belongs in a folder outside the run",
    )  # fmt: skip


def _relative(path: Path, base: Path) -> str:
    return os.path.relpath(path.resolve(), base.resolve())


def _stage_of(artifact: Artifact) -> str | None:
    """The stage that made an input; None for a folder from outside."""
    return str(read_run(artifact.run)["stage"]) if artifact.run else None


def all_runs(root: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Every run below `root` with its run.json, oldest first. Of one whose run.json is damaged the status is "damaged" and the
    `error` says so."""
    rows = []
    for file in root.glob("*/*/run.json"):
        try:
            row = read_run(file.parent)
        except ArtifactError as error:
            row = damaged(file.parent, error)
        rows.append((file.parent, row))
    return sorted(rows, key=lambda row: str(row[1].get("started") or ""))


def damaged(path: Path, error: ArtifactError) -> dict[str, Any]:
    """What stands in lists for a run.json that can't be read."""
    said = f"{error.message}; {AGAIN}"
    return {"stage": path.name.rpartition("-")[0], "status": "damaged", "digest": "", "parents": [], "error": said}


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
    """The chain behind a run, depth first: (depth, name of the input, run directory, its run.json). What several runs were made
    from is followed once, where it comes first."""
    seen: set[Path] = set()

    def walk(folder: Path, name: str, depth: int) -> Iterator[tuple[int, str, Path, dict[str, Any]]]:
        try:
            row = read_run(folder)
        except ArtifactError as error:
            if depth == 0:
                raise
            row = damaged(folder, error)
        yield depth, name, folder, row
        if folder.resolve() in seen:
            return
        seen.add(folder.resolve())
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
