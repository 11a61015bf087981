"""Promise 9: bad input is named by file, line and field, what was found and expected, and a fix; nothing half-written stays."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipeline import World, tutelage, world, write_sources  # noqa: F401 (a fixture)
from tutelage.files import read_json
from tutelage.rundir import all_runs
from tutelage.tokenizer.train import train

Capture = pytest.CaptureFixture[str]
ASK, SAY = {"role": "user", "content": "Where is the cat?"}, {"role": "assistant", "content": "By the door."}


def fails(capsys: Capture, root: Path, *words: object, says: tuple[str, ...]) -> str:
    """The command ends with 2, an error that says all of `says`, and no run that could be taken for a finished one."""
    said = tutelage(capsys, *words, "--runs", root)
    assert said.code == 2 and said.out == "" and "Traceback" not in said.err, said.err
    error = said.err[said.err.index("error: ") :]
    assert all(text in error for text in says), error
    if root.exists():
        for path, row in all_runs(root):
            if row["status"] != "done":
                assert row["status"] == "failed" and row["error"] and not (path / "DONE").exists()
                assert {p.name for p in path.iterdir()} <= {
                    "run.json",
                    "config.yaml",
                    "logs",
                    ".lock",
                    "metrics.jsonl",
                    "retemplated",
                }
        assert not [p for p in root.rglob("*") if "partial" in p.name or ".old-" in p.name]
    return error


def rows(path: Path, *lines: object) -> Path:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "content", "options", "says"),
    [
        ("a.txt", None, [], ("a.txt: no such file or folder", "found:", "fix:")),
        ("a.txt", b"", [], ("fix:",)),
        ("a.txt", b" \n\n", [], ("fix:",)),
        ("a.txt", b"short", [], ("fix:",)),
        ("a.txt", "one\ntwo caf\xe9 three\n".encode("latin-1"), [], ("a.txt:2: not utf-8 text", "0xe9", "--encoding cp1252")),
        ("a.jsonl", b'{"text": "one"}\n\n{"text": \n', [], ("a.jsonl:3: not valid JSON", 'found:    {"text":', "fix:")),
        ("a.jsonl", b'{"text": "one"}\n{"body": "two"}\n', [], ("a.jsonl:2:", "field:    text", "body", "fix:")),
        ("a.jsonl", b'[1]\n', [], ("a.jsonl:1: a row must be a JSON object", "found:    [1]", "expected:")),
        ("a.txt", b"text", ["--encoding", "utf8000"], ("unknown encoding", "field:    encoding", "fix:")),
    ],
    ids=["missing", "empty", "blank", "too short", "latin-1", "broken JSON", "no text field", "not an object", "encoding"],
)  # fmt: skip
def test_documents(
    tmp_path: Path, capsys: Capture, name: str, content: bytes | None, options: list[str], says: tuple[str, ...]
) -> None:
    """A traceback from deep inside a reader; or an empty corpus, found out by the training."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    fails(capsys, tmp_path / "runs", "data", "--sources", tmp_path / name, *options, says=says)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": [ASK, {"role": "bot", "content": "x"}]}, ("chats.jsonl:2:", "found:    bot", "assistant")),
        ({"messages": [ASK, {"role": "assistant"}]}, ("chats.jsonl:2:", "content")),
        ({"messages": [ASK]}, ("chats.jsonl:2:", "assistant")),
        ({"messages": "hello"}, ("chats.jsonl:2:", "messages")),
        ({"one": "a", "two": "b"}, ("chats.jsonl:2:", "fix:")),
        ('{"messages": [', ("chats.jsonl:2: not valid JSON",)),
    ],
)
def test_conversations(tmp_path: Path, capsys: Capture, row: object, says: tuple[str, ...]) -> None:
    """A wrong role that a template renders as nothing, and a model that never learns from it."""
    path = rows(tmp_path / "chats.jsonl", {"messages": [ASK, SAY]}, row)
    fails(capsys, tmp_path / "runs", "data", "--kind", "conversations", "--sources", path, says=says)


def test_skipped_rows_are_kept(tmp_path: Path, capsys: Capture) -> None:
    """`on_error=skip` that loses rows without saying which."""
    write_sources(tmp_path)
    with (tmp_path / "chats.jsonl").open("a") as f:
        f.write("{\n")
    words = (
        "data",
        "--kind",
        "conversations",
        "--sources",
        tmp_path / "chats.jsonl",
        "--on_error",
        "skip",
        "--runs",
        tmp_path / "r",
    )
    said = tutelage(capsys, *words)
    assert said.code == 0
    (rejected,) = (
        json.loads(x) for x in (Path(said.out.strip()) / "records" / "rejected.jsonl").read_text().splitlines() if "JSON" in x
    )
    assert rejected["line"] == 81 and rejected["file"].endswith("chats.jsonl") and rejected["excerpt"] == "{"


@pytest.fixture
def model(world: World, tmp_path: Path) -> Path:  # noqa: F811
    """A copy of a model folder, to be damaged."""
    return Path(shutil.copytree(world.made["base"] / "model", tmp_path / "model"))


def sft(world: World, model: Path) -> list[object]:  # noqa: F811
    return ["sft", "--model", model, "--data", world.made["chats"], "--steps", 1, "--threads", 1, "--kernels", "off"]


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**read_json(path), **changes}))


def test_models(world: World, model: Path, tmp_path: Path, capsys: Capture) -> None:  # noqa: F811
    """Weights of another shape read as noise, ids beyond the table, rows beyond the context, a pickle that is opened."""
    root, line = tmp_path / "runs", sft(world, model)
    fails(
        capsys,
        root,
        *line,
        "--sequence_length",
        4096,
        says=("sequence_length", "found:    4096", "expected: at most 128", "fix:"),
    )
    fails(capsys, root, *line, "--device", "cuda:7", says=("no CUDA device here", "field:    device", "fix:"))
    fails(capsys, root, *line, "--template", "chatlm", says=("template", "chatml"))
    edit(model / "config.json", hidden_size=64)
    fails(capsys, root, *line, says=(str(model), "[300, 32]", "64"))
    edit(model / "config.json", hidden_size=32, model_type="gpt9")
    fails(capsys, root, *line, says=("gpt9",))
    edit(model / "config.json", model_type="qwen3")
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    fails(capsys, root, *line, says=("pytorch_model.bin", "pickle", "expected: model.safetensors", "fix:"))
    (model / "pytorch_model.bin").unlink()
    fails(capsys, root, *line, says=("weights are missing", "expected:", "fix:"))
    (model / "model.safetensors").write_bytes(b"\x10\x00\x00")
    fails(capsys, root, *line, says=("model.safetensors: a damaged safetensors file", "fix:"))
    (model / "config.json").write_text("{")
    fails(capsys, root, *line, says=("config.json: not valid JSON", "fix:"))


def test_a_tokenizer_of_another_model(world: World, model: Path, tmp_path: Path, capsys: Capture) -> None:  # noqa: F811
    """Token ids beyond the embedding table: an index error in the first step, or on a GPU a crash without a message."""
    train([p.read_text() for p in (world.folder / "texts").iterdir()], vocab_size=340, out=tmp_path / "t")
    for file in ("tokenizer.json", "tokenizer_config.json", "tutelage.json", "special_tokens_map.json"):
        if (tmp_path / "t" / file).exists():
            shutil.copyfile(tmp_path / "t" / file, model / file)
    fails(capsys, tmp_path / "runs", *sft(world, model), says=("found:", "expected: ids below 300", "fix:"))


WRONG_RECORDS = ("other records than this stage reads", "found:    Document", "expected: Conversation", "tutelage pretrain")


def test_the_wrong_kind_of_input(world: World, tmp_path: Path, capsys: Capture) -> None:  # noqa: F811
    """Documents where conversations are needed, a run where another kind of run is needed."""
    corpus, base, root = world.made["corpus"], world.made["base"], tmp_path / "runs"
    fails(capsys, root, "sft", "--model", base, "--data", corpus, says=WRONG_RECORDS)
    fails(capsys, tmp_path / "r2", "sft", "--model", corpus, "--data", corpus, says=("this run made records, not model", "fix:"))
    fails(
        capsys,
        tmp_path / "r3",
        "tokenizer",
        "--data",
        world.folder / "texts",
        says=("not a records folder", "schema.json", "fix:"),
    )


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 48 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("only root can make a small disk to fill")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_and_read_only_disks(disk: Path, tmp_path: Path, capsys: Capture) -> None:
    """A run that dies with half a corpus under its final name; the same command, with room again, must do."""
    write_sources(tmp_path)
    (tmp_path / "texts" / "long.txt").write_text("\n".join(f"line {i} has its own number {i * i}" for i in range(4000)))
    line = ("data", "--sources", tmp_path / "texts")
    said = tutelage(capsys, *line, "--runs", disk / "runs")
    assert said.code == 2 and "the disk is full" in said.err and "fix:" in said.err and "Traceback" not in said.err, said.err
    assert not list(disk.rglob("DONE")) and not list(disk.rglob("records")) and not list(disk.rglob("*partial*"))
    subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
    done = tutelage(capsys, *line, "--runs", disk / "runs")
    assert done.code == 0 and "data: resuming" in done.err and (Path(done.out.strip()) / "DONE").exists()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    said = tutelage(capsys, *line, "--runs", disk / "others")
    assert said.code == 2 and "read-only" in said.err and str(disk / "others") in said.err and "--runs" in said.err
    assert tutelage(capsys, *line, "--runs", disk / "runs").code == 0  # a hit writes nothing
    assert "done" in tutelage(capsys, "runs", "--runs", disk / "runs").out


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_forbidden_folder(tmp_path: Path, capsys: Capture) -> None:
    """A traceback for a folder of somebody else."""
    write_sources(tmp_path)
    (tmp_path / "others").mkdir(mode=0o500)
    said = tutelage(capsys, "data", "--sources", tmp_path / "texts", "--runs", tmp_path / "others" / "runs")
    assert said.code == 2 and "permission denied" in said.err and "--runs" in said.err
