"""Tokens on disk: the same bytes from any number of workers and after any kill, every token predicted, bad input named."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tutelage.chat.render import Renderer
from tutelage.data.tokens import encode
from tutelage.data.tokens.shards import Segments, tokenize
from tutelage.errors import ArtifactError, DataError
from tutelage.files import folder_digest
from tutelage.records import Conversation, Document, Message, dump_line
from tutelage.tokenizer.load import TokenizerFolder
from tutelage.tokenizer.train import train

TEXTS = [f"Ünïcode {i} " + "a cat sat on the mat, " * (i % 9) + "end.\n" for i in range(300)]
DOCUMENTS = [Document.make(t, source=f"{i}.txt") for i, t in enumerate(TEXTS)]
CONVERSATIONS = [
    Conversation.make([Message(role="user", content=f"say {i}"), Message(role="assistant", content=f"é{i} cat")], source="c")
    for i in range(40)
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "t"
    train(TEXTS, vocab_size=400, out=folder)
    return folder


def artifact(folder: Path, kind: str, rows, validation=None) -> Path:
    folder.mkdir(parents=True)
    (folder / "schema.json").write_text(json.dumps({"type": kind, "version": 1}))
    for name, part in (("train", rows), ("validation", rows[:3] if validation is None else validation)):
        (folder / f"{name}.jsonl").write_text("".join(dump_line(r) + "\n" for r in part), encoding="utf-8")
    return folder


@pytest.fixture
def documents(tmp_path) -> Path:
    return artifact(tmp_path / "documents", "Document", DOCUMENTS)


@pytest.fixture
def small_chunks(monkeypatch):
    """Many chunks from little text, in this process."""
    monkeypatch.setattr(encode, "CHUNK_BYTES", 4000)


def test_a_document_is_start_text_end(documents, tokenizer, tmp_path):
    """Guards against a first token that nothing predicts (bits per byte would be flattered) and against a missing end token."""
    facts = tokenize(documents, tokenizer, tmp_path / "out")
    folder, segments = TokenizerFolder.open(tokenizer), Segments.open(tmp_path / "out" / "train")
    assert len(segments) == len(DOCUMENTS) and segments.kind == "text"
    for i, d in enumerate(DOCUMENTS):
        assert segments.ids(i).tolist() == [folder.eos_id, *folder.encode_text(d.text), folder.eos_id]
        assert segments.record_id(i) == d.id and segments.bytes(i) == len(d.text.encode())
        assert segments.supervised[i] == segments.lengths[i] - 1
    assert segments.totals["bytes"] == sum(len(t.encode()) for t in TEXTS) == facts["splits"]["train"]["bytes"]
    assert segments.ids(0).dtype == np.uint16 and isinstance(segments.ids(0).base, np.memmap)
    assert not list((tmp_path / "out").rglob("*mask*")) and not (tmp_path / "out" / "parts").exists()


def test_a_conversation_keeps_the_renderers_mask(tokenizer, tmp_path):
    """Guards against a mask that slips against the ids, and counts that don't tell the truth about it."""
    tokenize(artifact(tmp_path / "chat", "Conversation", CONVERSATIONS), tokenizer, tmp_path / "out", workers=2)
    segments, renderer = Segments.open(tmp_path / "out" / "train"), Renderer(tokenizer)
    expected = [(c, r) for c in CONVERSATIONS for r in renderer.render(c)]
    assert len(segments) == len(expected)
    for i, (conversation, rendered) in enumerate(expected):
        assert segments.ids(i).tolist() == rendered.ids.tolist() and segments.mask(i).tolist() == rendered.mask.tolist()
        assert segments.supervised[i] == rendered.mask.sum() and segments.record_id(i) == conversation.id
        assert segments.bytes(i) >= len(conversation.messages[-1].content.encode())
    half = segments.supervised_in(np.array([0, 0]), np.array([0, 0]), np.array([segments.lengths[0], segments.lengths[0] - 2]))
    assert half.tolist() == [segments.mask(0)[1:].sum(), segments.mask(0)[1:-2].sum()]


def test_unsupervised_samples_are_counted(tokenizer, tmp_path):
    """Guards against samples without a supervised token that vanish without a number (promise 2)."""
    mute = [
        Conversation.make(
            [Message(role="user", content=f"q{i}"), Message(role="assistant", content="a", train=False)], source="c"
        )
        for i in range(5)
    ]
    facts = tokenize(artifact(tmp_path / "chat", "Conversation", CONVERSATIONS + mute), tokenizer, tmp_path / "out")
    totals, segments = facts["splits"]["train"], Segments.open(tmp_path / "out" / "train")
    assert totals["unsupervised"] == int((segments.supervised == 0).sum())
    assert totals["segments"] in (len(CONVERSATIONS), len(CONVERSATIONS) + 5)  # a renderer by turns makes no sample of them


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("shard_tokens", [1, 2000, 10**9])
def test_chunks_and_shards_lose_no_line(documents, tokenizer, tmp_path, shard_tokens):
    """Guards against lines lost or doubled at a border of chunks or shards."""
    tokenize(documents, tokenizer, tmp_path / "out", shard_tokens=shard_tokens)
    segments, folder = Segments.open(tmp_path / "out" / "train"), TokenizerFolder.open(tokenizer)
    assert [segments.record_id(i) for i in range(len(segments))] == [d.id for d in DOCUMENTS]
    assert all(segments.ids(i)[1:-1].tolist() == folder.encode_text(d.text) for i, d in enumerate(DOCUMENTS))
    assert len(segments.index["shards"]) > 5 or shard_tokens > 1


def test_lines_belong_to_one_chunk(tmp_path):
    """Guards against a line that begins exactly at a border, an empty line or a missing last line end."""
    file = tmp_path / "x.jsonl"
    file.write_bytes(b"aaa\nbb\n\ncccc\nd")
    for size in range(1, 16):
        chunks = [
            encode.Chunk(source=str(file), begin=b, end=min(b + size, 14), part="") for b in range(0, file.stat().st_size, size)
        ]
        assert [line for c in chunks for line in encode.lines_of(c)] == [b"aaa", b"bb", b"cccc", b"d"], size


SCRIPT = """
import os, signal, sys
from pathlib import Path
from tutelage.data.tokens import encode, shards as tokens
encode.CHUNK_BYTES = 4000
records, tokenizer, out, workers, stop = sys.argv[1:]
def progress(done, total):
    if stop == "stop" and done > total / 4:
        print("half", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)  # at once: workers go on while the callback runs
tokens.tokenize(Path(records), Path(tokenizer), Path(out), workers=int(workers), progress=progress)
"""


def start(documents: Path, tokenizer: Path, out: Path, workers: int, stop: str) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", SCRIPT, str(documents), str(tokenizer), str(out), str(workers), stop]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)


def test_killed_and_resumed_equals_straight_with_any_number_of_workers(documents, tokenizer, tmp_path):
    """Guards against output that depends on the number of processes, or work lost or doubled by kill -9."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert start(documents, tokenizer, straight, 1, "go").wait() == 0
    process = start(documents, tokenizer, killed, 2, "stop")
    assert process.stdout is not None and process.stdout.readline() == "half\n"
    assert process.wait() == -signal.SIGKILL
    with pytest.raises(ArtifactError, match="not finished"):
        Segments.open(killed / "train")
    left = {p.name: p.stat().st_mtime_ns for p in (killed / "parts").glob("*.npy")}
    assert len(left) >= 2  # all of them where the workers were fast
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "CHUNK_BYTES", 4000)
        tokenize(documents, tokenizer, killed, workers=2, progress=lambda done, total: seen.append(done))
    assert folder_digest(killed) == folder_digest(straight)
    assert seen[0] >= 4000 * (len(left) - 2), "finished parts were made again"  # the last of each split may be short


def test_parts_of_other_input_are_not_used(documents, tokenizer, tmp_path, monkeypatch):
    """Guards against resuming with the tokens of another corpus."""
    out = tmp_path / "out"
    monkeypatch.setattr("tutelage.data.tokens.shards._join", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        tokenize(documents, tokenizer, out)
    assert list((out / "parts").glob("train_*.npy"))
    monkeypatch.undo()
    other = artifact(tmp_path / "other", "Document", [Document.make("Another text.", source="x")])
    tokenize(other, tokenizer, out)
    segments = Segments.open(out / "train")
    assert [segments.record_id(i) for i in range(len(segments))] == [Document.make("Another text.", source="x").id]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("line", "workers"),
    [
        ('{"id": "00", "te', 1),
        ('{"id": "00", "source": "x"}', 1),
        ('{"id": "00", "text": "\\ud800"}', 1),
        ("[1]", 1),
        ('{"id": "00", "te', 2),
    ],
)
def test_a_broken_line_is_named(documents, tokenizer, tmp_path, line, workers):
    """Guards against a traceback, or a dropped line, where a record is broken (promise 9)."""
    file = documents / "train.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    lines[210] = line
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"train\.jsonl:211: ") as caught:
        tokenize(documents, tokenizer, tmp_path / "out", workers=workers)
    assert caught.value.fix


def test_bad_folders_are_named(documents, tokenizer, tmp_path):
    """Guards against unreadable errors for a folder that is missing, of another kind, damaged, or of another vocabulary."""
    with pytest.raises(ArtifactError, match="records artifact"):
        tokenize(tmp_path, tokenizer, tmp_path / "out")
    with pytest.raises(ArtifactError, match="no tokens here"):
        Segments.open(tmp_path)
    out = tmp_path / "out"
    largest = tokenize(documents, tokenizer, out)["splits"]["train"]["largest_id"]
    with pytest.raises(ArtifactError, match="one split"):
        Segments.open(out)
    assert Segments.open(out / "train", vocabulary=largest + 1)
    with pytest.raises(ArtifactError, match=f"id {largest}"):
        Segments.open(out / "train", vocabulary=largest)
    ids = out / "train" / "shard_00000.ids.npy"
    ids.write_bytes(ids.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="damaged"):
        Segments.open(out / "train")


def test_an_empty_training_split_is_an_error_and_an_empty_validation_split_is_not(tokenizer, tmp_path):
    """Guards against a run over nothing."""
    with pytest.raises(DataError, match="no record"):
        tokenize(artifact(tmp_path / "a", "Document", []), tokenizer, tmp_path / "out_a")
    tokenize(artifact(tmp_path / "b", "Document", DOCUMENTS, []), tokenizer, tmp_path / "out_b")
    assert len(Segments.open(tmp_path / "out_b" / "validation")) == 0


@pytest.mark.parametrize(("name", "damage"), [("ids", "past the vocabulary"), ("segments", "flipped"), ("mask", "255")])
def test_damaged_shards_of_the_right_size_are_named(name, damage, tokenizer, tmp_path):
    """Guards against an IndexError inside the model, weights of 255, and texts that begin in the middle of others, where tokens
    come from a folder and not from a run."""
    tokenize(artifact(tmp_path / "c", "Conversation", CONVERSATIONS), tokenizer, tmp_path / "out")
    file = tmp_path / "out" / "train" / f"shard_00000.{name}.npy"
    held = np.load(file)
    if name == "segments":
        held = held[::-1]
    else:
        held[-3:] = np.iinfo(held.dtype).max
    np.save(file, held)
    with pytest.raises(ArtifactError, match="a shard is damaged") as caught:
        segments = Segments.open(tmp_path / "out" / "train")
        for i in range(len(segments)):
            segments.ids(i), segments.mask(i)
    assert caught.value.file == file and "--force" in str(caught.value.fix)


def test_an_index_with_other_types_is_named(tokenizer, documents, tmp_path):
    """Guards against a TypeError for a damaged tokens.json."""
    tokenize(documents, tokenizer, tmp_path / "out")
    file = tmp_path / "out" / "train" / "tokens.json"
    whole = json.loads(file.read_text())
    for change in ({"shards": 3}, {"shards": [1]}, {"vocabulary": "x"}, {"kind": None}, {"largest_id": []}):
        file.write_text(json.dumps({**whole, **change}))
        with pytest.raises(ArtifactError) as caught:
            Segments.open(file.parent, vocabulary=400)
        assert caught.value.file == file
