"""Promise 7: a run that was killed and resumed is the run that was never killed, bit for bit."""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.guarantees import tiny
from tutelage.errors import ArtifactError, TrainingStopped
from tutelage.files import read_json, write_json
from tutelage.train import hooks
from tutelage.train.loop import train


def same_run(run: Path, other: Path) -> None:
    """Weights, optimizer state, progress, metrics and samples are equal; only clocks may differ."""
    for name in ("model/model.safetensors", "checkpoints/step_000010/optimizer.safetensors", "samples/step_000010.json"):
        assert (run / name).read_bytes() == (other / name).read_bytes(), name
    names = [sorted(p.name for p in (r / "checkpoints").iterdir()) for r in (run, other)]
    assert names[0] == names[1] == ["step_000008", "step_000010"]
    one, two = (read_json(r / "checkpoints" / "step_000010" / "progress.json") for r in (run, other))
    assert {k: v for k, v in one.items() if k != "seconds"} == {k: v for k, v in two.items() if k != "seconds"}
    assert tiny.metrics(run) == tiny.metrics(other)
    for key in ("loss", "validation_loss", "steps", "tokens"):
        assert read_json(run / "run.json")[key] == read_json(other / "run.json")[key] is not None


def test_killed_again_and_again_and_resumed_is_never_killed(tmp_path):
    """Guards against anything left out of a checkpoint (moments, step, order of data, random state), torn checkpoints and doubled
    metrics. One real run dies of SIGKILL before an update, half-way through a line of metrics, inside a checkpoint, before old
    checkpoints are removed, at a random step, and while the finished model is written."""
    step = random.SystemRandom().randint(1, 3)  # not pytest's seed: another place in every session
    places = [
        {"at": "update", "count": 2},  # nothing saved yet
        {"at": "metrics", "count": 5},
        {"at": "checkpoint", "count": 1},
        {"at": "prune", "count": 1},
        {"at": "forward", "count": step},
        {"at": "export"},
    ]
    for place in places:
        killed = tiny.start(tmp_path, die=place)
        assert killed.wait() == -signal.SIGKILL, (place, killed.said)
        run = tiny.run_folder(tmp_path)
        assert not (run / "DONE").exists() and not (run / "model").exists()
    last = tiny.start(tmp_path)
    assert last.wait() == 0, last.said
    assert "resuming after step 10 of 10" in last.said
    same_run(run, tiny.straight())


def test_ctrl_c_leaves_a_checkpoint_and_the_same_command_goes_on(tmp_path):
    """Guards against work lost to Ctrl-C: the step is finished, saved (no checkpoint was due), and the run ends as if nothing
    had been."""
    stopped = tiny.start(tmp_path, die={"at": "forward", "count": 3, "how": signal.SIGINT}, checkpoint_every=100)
    assert stopped.wait() == 130, stopped.said
    run = tiny.run_folder(tmp_path)
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step_000003"]
    assert read_json(run / "run.json")["status"] == "interrupted" and "with a checkpoint" in stopped.said
    going_on = tiny.start(tmp_path)
    assert going_on.wait() == 0, going_on.said
    assert "resuming after step 3 of 10" in going_on.said
    same_run(run, tiny.straight())


def test_a_run_killed_on_two_ranks_goes_on_on_one(tmp_path):
    """Guards against state that belongs to a number of ranks: two processes, one killed, and the rest on one, to rounding."""
    pair = [tiny.start(tmp_path, env=env, die={"at": "update", "count": 7, "rank": 1}) for env in tiny.ranks(2)]
    assert pair[1].wait() == -signal.SIGKILL and pair[0].wait() not in (0, 3), [p.said for p in pair]
    run = tiny.run_folder(tmp_path)
    alone = tiny.start(tmp_path)
    assert alone.wait() == 0, alone.said
    assert "resuming after step 6 of 10" in alone.said
    one, two = (load_file(r / "model" / "model.safetensors") for r in (run, tiny.straight()))
    assert tiny.furthest(one, two) < 1e-5
    assert [r["step"] for r in tiny.metrics(run)] == [r["step"] for r in tiny.metrics(tiny.straight())]


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    """Guards against going on with other data, rates or steps as if they were the same run."""
    train(tiny.job(tmp_path, steps=2, checkpoint_every=1))
    with pytest.raises(TrainingStopped, match="belongs to other settings"):
        train(tiny.job(tmp_path, steps=4, identity="other"))


class Scripted(hooks.Validate):
    """Validation losses that are given, one a step; the real weights go with them."""

    def __init__(self, losses: list[float]) -> None:
        super().__init__([], {}, every=1)
        self.losses = losses

    def start(self, state) -> None: ...

    def run(self, state) -> None:
        self.at = state.progress.step
        self.latest = self.losses[self.at - 1]


def early_stopping(folder: Path, losses: list[float], steps: int = 8):
    validate = Scripted(losses)
    stop = hooks.EarlyStop(validate, patience=2, folder=folder / "best")
    return tiny.job(folder, steps=steps, checkpoint_every=1, keep_checkpoints=9, hooks={"validate": validate, "early_stop": stop})


def policy(job) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in job.recipe.parts["policy"].named_parameters()}


def test_early_stop_goes_back_to_the_best_weights(tmp_path):
    """Guards against ending with the last, worse weights, and against a run that was killed after it had stopped and, resumed,
    trains on: killed in the middle or after its last checkpoint, it ends with the same weights and the same number of steps."""
    losses = [3.0, 2.0, 2.5, 2.4, 1.0, 1.0, 1.0, 1.0]
    straight = early_stopping(tmp_path / "a", losses)
    state = train(straight)
    assert state.progress.step == 4 and "best 2.0000 at step 2" in str(state.stop)
    best = load_file(tmp_path / "a" / "checkpoints" / "step_000002" / "policy.safetensors")
    assert all(torch.equal(best[n], p) for n, p in policy(straight).items())
    for step in (1, 3, 4):
        folder = tmp_path / f"killed-{step}"
        train(early_stopping(folder, losses))
        for later in range(step + 1, 5):
            shutil.rmtree(folder / "checkpoints" / f"step_{later:06d}")
        resumed = early_stopping(folder, losses)
        again = train(resumed)
        assert (again.progress.step, again.stop) == (4, state.stop)
        assert all(torch.equal(best[n], p) for n, p in policy(resumed).items())


def test_what_a_killed_process_left_is_cleaned_up(tmp_path):
    """Guards against a disk that fills with halves of checkpoints, and against taking one of them for a checkpoint."""
    half = tmp_path / "checkpoints" / ".step_000009.partial-1"
    write_json(half / "progress.json", {"step": 9})
    state = train(tiny.job(tmp_path, steps=2, checkpoint_every=1))
    assert state.progress.step == 2 and not half.exists()


def damaged(file: Path) -> None:
    """The same size, other content."""
    file.write_bytes(file.read_bytes()[:-200] + bytes(200))


@pytest.mark.parametrize("name", ["optimizer.safetensors", "policy.safetensors", "progress.json"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, capsys, name):
    """Guards against a run that goes on from zeros, or from weights of another step, and ends as if nothing had been: it goes on
    from the checkpoint before, says so, and ends bit for bit as one that nothing disturbed."""
    train(tiny.job(tmp_path / "straight", checkpoint_every=2))
    begun = tmp_path / "begun"
    train(tiny.job(begun, checkpoint_every=2, keep_checkpoints=9))
    shutil.rmtree(begun / "checkpoints" / "step_000006")
    damaged(begun / "checkpoints" / "step_000004" / name)
    (begun / "checkpoints" / "step_x").mkdir()
    state = train(tiny.job(begun, checkpoint_every=2, keep_checkpoints=1))
    said = capsys.readouterr().err
    assert state.progress.step == 6 and "step_000004 is passed over" in said and "resuming after step 2 of 6" in said
    one, two = (tmp_path / x / "checkpoints" / "step_000006" / "policy.safetensors" for x in ("straight", "begun"))
    assert one.read_bytes() == two.read_bytes()
    assert [p.name for p in (begun / "checkpoints").glob("step_0*")] == ["step_000006"]


def test_where_no_checkpoint_is_whole_the_run_stops(tmp_path):
    """Guards against days of training that start over without a question."""
    train(tiny.job(tmp_path, checkpoint_every=3))
    for folder in (tmp_path / "checkpoints").iterdir():
        damaged(folder / "policy.safetensors")
    with pytest.raises(ArtifactError, match="not as it was written") as caught:
        train(tiny.job(tmp_path, steps=9, checkpoint_every=3))
    assert "step_000006/policy.safetensors" in str(caught.value.file) and "copy it back" in str(caught.value.fix)


def test_damaged_best_weights_are_not_gone_back_to(tmp_path):
    """Guards against a model of zeros behind the best validation loss."""
    losses = [3.0, 2.0, 2.5, 2.4, 1.0, 1.0, 1.0, 1.0]
    train(early_stopping(tmp_path, losses))
    damaged(tmp_path / "best" / "policy.safetensors")
    with pytest.raises(ArtifactError, match="not as it was written"):
        train(early_stopping(tmp_path, losses))


def test_damaged_lines_of_metrics_are_left_out_and_said(tmp_path, capsys):
    """Guards against a run that cannot be resumed for a byte of its curves."""
    train(tiny.job(tmp_path, steps=4, checkpoint_every=2, hooks={"record": hooks.Record()}))
    shutil.rmtree(tmp_path / "checkpoints" / "step_000004")
    file = tmp_path / "metrics.jsonl"
    first, second, *rest = file.read_bytes().splitlines()
    file.write_bytes(b"\n".join([first, b"\xff\xfe[1]", b"[1]", b'{"step": null}', second, *rest, b'{"st']))
    assert train(tiny.job(tmp_path, steps=4, checkpoint_every=2, hooks={"record": hooks.Record()})).progress.step == 4
    assert "3 damaged lines are left out, the first is line 2" in capsys.readouterr().err
    assert [row["step"] for row in tiny.metrics(tmp_path)] == [1, 2, 3, 4]
