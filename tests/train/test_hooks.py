"""Hooks: the line on the console, metrics.jsonl, TensorBoard's files, samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.guarantees import tiny
from tutelage import log
from tutelage.config.train import Schedule
from tutelage.train import hooks
from tutelage.train.checkpoint import Progress
from tutelage.train.loop import State, train
from tutelage.train.step import StepResult


def state(folder: Path, step: int = 4, **job) -> State:
    out = State(tiny.job(folder, steps=10, **job), Progress(step, tokens=400, seconds=2.0))
    out.result = StepResult(2.5, {"loss": 2.5}, 0.75)
    out.step_seconds, out.step_tokens, out.lr_factor = 0.5, 100, 0.5
    return out


def test_the_line_says_loss_rate_and_time_left(tmp_path):
    """Guards against a rate or a remaining time made from the wrong unit."""
    display = hooks.Display("pretrain")
    now = state(tmp_path, peak_flops=1e6, flops_per_token=2000.0)
    display.speeds = [(100, 0.5), (300, 0.5)]
    assert display.line(now) == "loss 2.500  400 tokens/s  80% of the machine's product rate  3s left"
    shown = hooks.Display("rl", headline=lambda: "reward 0.250")
    shown.speeds = display.speeds
    assert shown.line(now).startswith("reward 0.250  400 tokens/s")
    assert [hooks.duration(s) for s in (5, 65, 3700)] == ["5s", "1m05s", "1h01"]


def test_away_from_a_terminal_a_line_comes_now_and_then(tmp_path, capsys):
    """Guards against logs with a line a step, and against a run that never says its last step."""
    display = hooks.Display("pretrain", every=1e9)
    for step in (1, 2, 10):
        now = state(tmp_path, step=step)
        if step == 1:
            display.start(now)
        display.after_step(now)
    said = capsys.readouterr().err
    assert "pretrain 10/10" in said and "pretrain 2/10" not in said


class Terminal(hooks.Display):
    closed = False

    def close(self) -> None:
        super().close()
        self.closed = True


def test_hooks_are_closed_when_a_run_fails(tmp_path):
    """Guards against a terminal left without its cursor after an error or Ctrl-C."""
    display = Terminal("pretrain")
    data = tiny.Poisoned(tiny.source("conversations"), at=1)
    with pytest.raises(tiny.TrainingStopped):
        train(tiny.job(tmp_path, data=data, hooks={"display": display}))
    assert display.closed


def test_facts_are_one_row_a_step(tmp_path):
    """Guards against a metric that is missing, doubled or in another unit."""
    row = hooks.facts(state(tmp_path, peak_flops=1e6, flops_per_token=2000.0))
    expected = {"step": 4, "tokens": 400, "loss": 2.5, "grad_norm": 0.75, "tokens_per_second": 200.0, "seconds": 2.0, "mfu": 0.4}
    assert expected.items() <= row.items()
    train(tiny.job(tmp_path / "run", steps=3, hooks={"record": hooks.Record()}))
    assert [r["step"] for r in tiny.metrics(tmp_path / "run")] == [1, 2, 3]


def test_the_learning_rate_is_a_rate(tmp_path):
    """Guards against the schedule's factor, 1.0 at the peak whatever the rate, written under the rate's name."""
    train(tiny.job(tmp_path, steps=3, schedule=Schedule(name="linear", warmup=0.0, final=0.0), hooks={"record": hooks.Record()}))
    rows = tiny.metrics(tmp_path)
    assert [r["lr_factor"] for r in rows] == pytest.approx([1.0, 2 / 3, 1 / 3])
    assert [r["lr"] for r in rows] == pytest.approx([tiny.RATES.embedding_lr * r["lr_factor"] for r in rows])


def test_metrics_after_a_step_are_dropped(tmp_path):
    """Guards against doubled rows after a resume, against losing rows that were final, and against a line cut by a kill."""
    metrics = log.Metrics(tmp_path / "metrics.jsonl")
    for step in (0, 1, 2, 3):
        metrics.write(step=step, loss=1.0)
    metrics.write(note="without a step")
    metrics._file.write('{"step": 1, "lo')
    metrics._file.flush()
    metrics.truncate_after(2)
    metrics.write(step=3, loss=9.0)
    metrics.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r.get("step") for r in rows] == [0, 1, 2, None, 3] and rows[-1]["loss"] == 9.0


def test_tensorboard_reads_what_is_written(tmp_path, monkeypatch):
    """Guards against event files that tensorboard's own reader cannot read, and against steps that a resumed run shows twice."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first in (1, 3):  # the second attempt resumes after step 2
        board = hooks.TensorBoard()
        now = 1e9 + first  # an attempt is a process of its own, later than the one before: readers sort files by their second
        monkeypatch.setattr("time.time", lambda now=now: now)
        board.start(state(tmp_path, step=first - 1))
        for step in range(first, first + 4):
            board.after_step(state(tmp_path, step=step))
        board.close()
    reader = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    events = reader.Scalars("train/loss")
    assert [e.step for e in events] == [1, 2, 3, 4, 5, 6] and events[0].value == pytest.approx(2.5)
    assert {"train/grad_norm", "train/tokens_per_second", "train/lr", "train/lr_factor"} <= set(reader.Tags()["scalars"])


def test_samples_are_written_at_their_steps(tmp_path):
    """Guards against samples of the first or last step that never come."""
    train(tiny.job(tmp_path, steps=5, hooks={"sample": hooks.Sample(lambda: [{"prompt": "a", "text": "b"}], every=2)}))
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == [f"step_{n:06d}.json" for n in (2, 4, 5)]
