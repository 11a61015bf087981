"""A tiny tokenizer, records, tokens and models, made once a session; and real training processes that can be killed.

Runs are made by a fork server that has imported everything (`warm.py`), so that a process costs a fork and not ten seconds of
imports. Each run is the command line's `main` in a process of its own, with the arguments and the environment that a user or
`torchrun` gives it.
"""

from __future__ import annotations

import atexit
import functools
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.utils.tensorboard
from torch import nn

import tutelage.cli.main
import tutelage.cli.show
import tutelage.engine
import tutelage.stages.pretrain
import tutelage.stages.sft
from tests import tiny as shared
from tutelage import log
from tutelage.chat.render import Renderer
from tutelage.config.train import Optimizer, Schedule
from tutelage.data.tokens.loader import GlobalBatch, StaticSource
from tutelage.data.tokens.shards import Segments, tokenize
from tutelage.errors import TrainingStopped
from tutelage.models.config import DecoderConfig
from tutelage.models.decoder import Decoder
from tutelage.models.export import save as save_model
from tutelage.models.init import build
from tutelage.objectives import objective
from tutelage.plan.code import code_digest
from tutelage.plan.machine import Machine
from tutelage.records import Conversation, Document, Message, dump_line
from tutelage.setup import trainer
from tutelage.tokenizer.load import TokenizerFolder
from tutelage.tokenizer.train import train as train_tokenizer
from tutelage.train import loop, tensors
from tutelage.train.loop import Job
from tutelage.train.optim import LearningRates, Optimizers
from tutelage.train.step import StepConfig

SHAPE: dict[str, Any] = {**shared.WIDTHS, "initializer_range": 0.1}
VOCABULARY = 320
ROW = 48
WORDS = [
    "the", "a", "cat", "dog", "mat", "door", "sat", "ran", "on", "by", "and", "to", "red", "old", "one", "two", "three", "four",
    "five", "six", "café", "日本", "🙂",
]  # fmt: skip
MACHINE = Machine(
    cpu="test", cores=1, threads=1, memory_bytes=1 << 33, gemm_flops_fp32=1e9, gemm_flops_bf16=1e9, memory_bandwidth=1e9,
    torch_version="test", quiet=True,
)  # fmt: skip


__all__ = ["TrainingStopped", "code_digest"]


# Data


@functools.cache
def home() -> Path:
    """A folder for everything of this session."""
    folder = Path(tempfile.mkdtemp(prefix="tutelage-tiny-"))
    owner = os.getpid()
    atexit.register(lambda: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == owner else None)
    return folder


def sentence(number: int, words: int) -> str:
    return " ".join(WORDS[(number * 7 + i * (3 + number % 5)) % len(WORDS)] for i in range(words))


def documents() -> list[Document]:
    """Texts of 3 to 40 words, so that some are longer than a row and most are not."""
    return [Document.make(f"{i}: {sentence(i, 3 + (i * 11) % 38)}", source="tiny") for i in range(40)]


def conversations() -> list[Conversation]:
    """Answers of very different lengths: rows have very different numbers of supervised tokens."""
    return [
        Conversation.make(
            [Message(role="user", content=f"{i}?"), Message(role="assistant", content=sentence(i, 1 + (i * 5) % 7))],
            source="tiny",
        )
        for i in range(40)
    ]


def records_folder(folder: Path, records: list[Any], held_out: int = 6) -> Path:
    """A records artifact: the last `held_out` are the validation split."""
    folder.mkdir(parents=True)
    cut = len(records) - held_out
    for name, part in (("train", records[:cut]), ("validation", records[cut:]), ("rejected", [])):
        (folder / f"{name}.jsonl").write_text("".join(f"{dump_line(r)}\n" for r in part), encoding="utf-8")
    (folder / "card.json").write_text("{}", encoding="utf-8")
    (folder / "schema.json").write_text(json.dumps({"type": type(records[0]).__name__, "version": 1}), encoding="utf-8")
    return folder


@functools.cache
def records(kind: str) -> Path:
    """The records artifact of `documents` or `conversations`."""
    return records_folder(home() / kind, documents() if kind == "documents" else conversations())


@functools.cache
def tokenizer(template: str = "default") -> Path:
    folder = home() / f"tokenizer-{template}"
    train_tokenizer([d.text for d in documents()], vocab_size=VOCABULARY, out=folder, template=template)
    return folder


@functools.cache
def tokens(kind: str, template: str = "default") -> Path:
    folder = home() / f"tokens-{kind}-{template}"
    tokenize(records(kind), tokenizer(template), folder, workers=1)
    return folder


def segments(kind: str, split: str = "train", template: str = "default") -> Segments:
    return Segments.open(tokens(kind, template) / split)


def chat_segments(rows: list[Conversation], folder: Path, template: str = "default") -> Segments:
    """The training split of these conversations."""
    tokenize(records_folder(folder / "records", [*rows, rows[0]], 1), tokenizer(template), folder / "tokens", workers=1)
    return Segments.open(folder / "tokens" / "train")


# Models


def config(**change: Any) -> DecoderConfig:
    return shared.config(**{"vocab_size": VOCABULARY, **SHAPE, **change})


def model(seed: int = 0, dtype: torch.dtype = torch.float32, **change: Any) -> Decoder:
    return build(config(**change), seed, dtype=dtype)


@functools.cache
def checkpoint() -> Path:
    """A model folder to fine-tune, with new weights."""
    words = TokenizerFolder.open(tokenizer())
    shape = config().with_tokens(bos=words.bos_id, eos=tuple(words.stop_ids), pad=words.pad_id)
    folder = home() / "checkpoint"
    save_model(build(shape, 0), folder, tokenizer(), stop_ids=words.stop_ids)
    return folder


def renderer(template: str = "default") -> Renderer:
    return Renderer(tokenizer(template))


# Jobs of the loop, in this process


def source(kind: str = "documents", **change: Any) -> StaticSource:
    settings = {"row_length": ROW, "rows_per_step": 4, "micro_rows": 2, "seed": 0, **change}
    return StaticSource(segments(kind), **settings)


RATES = LearningRates(lr=1e-2, matrix_lr=1e-2, embedding_lr=1e-2)


def job(
    folder: Path,
    *,
    steps: int = 6,
    parts: Mapping[str, nn.Module] | None = None,
    data: Any = None,
    optimizer: str = "muon",
    **change: Any,
) -> Job:
    """A job of the loop on the tiny model. `change`: other fields of `Job`."""
    parts = dict(parts or {"policy": model()})
    values: dict[str, Any] = {
        "recipe": StepConfig(parts, objective("next_token")),
        "source": data or source(),
        "optimizers": Optimizers(parts, Optimizer(name=optimizer), RATES),
        "schedule": Schedule(),
        "steps": steps,
        "folder": folder,
        "metrics": log.Metrics(folder / "metrics.jsonl"),
        "identity": "tiny",
        **change,
    }
    return Job(**values)


def gradients_of(part: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in part.named_parameters() if p.grad is not None}


def furthest(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> float:
    """The largest difference of two sets of tensors, as a share of the largest value."""
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).abs().max()) for n in a) / max(float(a[n].abs().max()) for n in a)


class Poisoned:
    """A batch source with one weight that is not a number, in the last row of rank `rank` at step `at`."""

    def __init__(self, inner: StaticSource, at: int, rank: int = 0) -> None:
        self.inner, self.at, self.rank = inner, at, rank
        self.record: tuple[str, ...] = ()

    def next(self, step: int) -> GlobalBatch:
        batch = self.inner.next(step)
        if step != self.at or self.inner.rank != self.rank:
            return batch
        *before, last = batch.micro
        weights = last.weights.clone()
        weights[-1, int(weights[-1].nonzero()[0])] = float("nan")
        self.record = batch.rows[-1]
        return replace(batch, micro=[*before, replace(last, weights=weights)])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


# Real processes


class Process:
    """A training process. `wait()` gives its exit code (negative: the signal that killed it); `said` what it printed."""

    def __init__(self, spec: dict[str, Any]) -> None:
        number, folder = len(list(home().glob("process-*"))), home()
        self.log = folder / f"process-{number}-{spec.get('env', {}).get('RANK', 0)}.log"
        self.log.touch()
        self._process = _context().Process(target=_run, args=({**spec, "log": str(self.log)},), daemon=True)
        self._process.start()

    def wait(self, seconds: float = 300.0) -> int:
        self._process.join(seconds)
        if self._process.exitcode is None:
            self._process.kill()
            raise AssertionError(f"still running after {seconds} s:\n{self.said}")
        return self._process.exitcode

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")


@functools.cache
def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.guarantees.warm"])
    return context


def arguments(runs: Path, **settings: Any) -> list[str]:
    """The command line of a tiny `pretrain` (or another `stage`) below `runs`; settings by their dotted names."""
    stage = settings.pop("stage", "pretrain")
    inputs = {"data": records("documents"), "tokenizer": tokenizer()}
    defaults: dict[str, Any] = {
        **(inputs if stage == "pretrain" else {}), "steps": 10, "sequence_length": ROW, "batch_tokens": 4 * ROW, "micro_rows": 2,
        "checkpoint_every": 2, "evaluate_every": 3, "sample_every": 5, "threads": 1, "device": "cpu", "schedule.warmup": 2,
        "optimizer.lr": 1e-2, "optimizer.matrix_lr": 1e-2, "optimizer.embedding_lr": 1e-2,
        **({f"architecture.{k}": v for k, v in SHAPE.items()} if stage == "pretrain" else {}),
    }  # fmt: skip
    values = {**defaults, **settings}
    return [stage, "--runs", str(runs), *(x for k, v in values.items() for x in ("--set", f"{k}={v}"))]


def start(runs: Path, *, die: Mapping[str, Any] | None = None, env: Mapping[str, str] | None = None, **settings: Any) -> Process:
    """Starts `tutelage pretrain` on the tiny data. `die`: where the process gets which signal (see `_deaths`)."""
    return Process({"argv": arguments(runs, **settings), "die": dict(die or {}), "env": dict(env or {})})


def ranks(count: int) -> list[dict[str, str]]:
    """The environments that `torchrun --nproc-per-node count` gives its processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    every = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    return [{**every, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(count)]


def run_folder(runs: Path, stage: str = "pretrain") -> Path:
    """The one run of a stage below `runs`."""
    found = [p for p in runs.glob(f"cli/{stage}-*") if p.is_dir()]
    assert len(found) == 1, found
    return found[0]


@functools.cache
def straight(seed: int = 0) -> Path:
    """The run directory of ten steps that nothing disturbed."""
    process = start(home() / f"straight-{seed}", seed=seed)
    assert process.wait() == 0, process.said
    return run_folder(home() / f"straight-{seed}")


def metrics(run: Path, timing: bool = False) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, without what a clock decides."""
    clock = () if timing else ("seconds", "tokens_per_second", "mfu")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in row.items() if k not in clock} for row in rows]


def _run(spec: dict[str, Any]) -> None:
    """The body of a process: the command line, with everything it prints in a file."""
    out = os.open(spec["log"], os.O_WRONLY | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout = sys.stderr = log.console.file = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    os.environ.update(spec["env"])
    torch.set_num_threads(1)
    trainer.measure_machine = lambda: MACHINE  # two seconds of products that prove nothing here
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _deaths(**spec["die"])
    code = 1
    try:
        if "call" in spec:
            spec["call"](*spec["args"])
        else:
            sys.argv = ["tutelage", *spec["argv"]]
            tutelage.cli.main.main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


def poisoned_rank(folder: str) -> None:
    """A two-rank job whose rank 1 meets a weight that is not a number at step 2."""
    from tutelage.train import distributed

    distributed.start("cpu")
    data = Poisoned(source("conversations", rank=log.rank(), world=2), at=2, rank=1)
    try:
        loop.train(job(Path(folder), data=data, steps=4, checkpoint_every=1))
    except Exception as error:
        print(f"rank {log.rank()}: {error}\nrecords {data.record}", flush=True)
        raise SystemExit(3) from None


def _deaths(at: str = "", count: int = 1, how: int = signal.SIGKILL, rank: int = -1) -> None:
    """Sends this process the signal `how` the `count`-th time that it comes to the place `at`."""
    if not at or rank not in (-1, log.rank()):
        return
    owner, name = PLACES[at]
    real: Callable[..., Any] = getattr(owner, name)
    seen = 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == count:
            if at == "metrics":  # half a line is on disk when the process dies
                args[0]._file.write('{"step": 1')
                args[0]._file.flush()
            os.kill(os.getpid(), how)
        return real(*args, **kwargs)

    setattr(owner, name, dying)


PLACES: dict[str, tuple[Any, str]] = {
    # place: (owner, function before which the process dies)
    "forward": (loop, "train_step"),
    "update": (Optimizers, "step"),
    "metrics": (log.Metrics, "write"),
    "checkpoint": (loop.checkpoint, "write_json"),  # weights and state are written, the checkpoint is not whole yet
    "prune": (loop.checkpoint, "prune"),
    "export": (trainer, "save"),
    "shard": (tensors, "save_file"),  # a rank's part of a checkpoint
}
