"""Promise 7 for child runs: a finished run that is extended to more steps is the run that had them from the start."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.guarantees import tiny
from tests.guarantees.test_resume import early_stopping, policy
from tests.pipeline import World, tutelage, world  # noqa: F401 (a fixture)
from tutelage import api
from tutelage.config.base import load_yaml
from tutelage.config.stages import Pretrain
from tutelage.config.train import Schedule
from tutelage.errors import ConfigError
from tutelage.files import read_json, write_json
from tutelage.plan import machine
from tutelage.references import find
from tutelage.rundir import lineage
from tutelage.setup import extend, hyperparameters, text_rows, trainer
from tutelage.train.checkpoint import Progress
from tutelage.train.loop import State, train

Capture = pytest.CaptureFixture[str]
CONSTANT = {"schedule.name": "constant", "keep_checkpoints": 1}
STEPS, MORE = 6, 10


@pytest.fixture(autouse=True)
def machine_of_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring takes seconds and proves nothing here."""
    monkeypatch.setattr(trainer, "measure_machine", lambda: tiny.MACHINE)
    monkeypatch.setattr(machine, "measure", lambda: tiny.MACHINE)


def settings(stage: str = "pretrain") -> dict[str, Any]:
    if stage == "pretrain":
        return dict(CONSTANT)
    return {**CONSTANT, "stage": "sft", "model": tiny.checkpoint(), "data": tiny.records("conversations")}


def go(capsys: Capture, runs: Path, *more: object, **change: Any) -> Path:
    """The run directory of a command that has to end well."""
    said = tutelage(capsys, *tiny.arguments(runs, **{**CONSTANT, "steps": STEPS, **change}), *more)
    assert said.code == 0, said.err
    return Path(said.out.strip())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs with a finished one of six steps. Tests copy it."""
    runs = tmp_path_factory.mktemp("finished")
    process = tiny.start(runs, steps=STEPS, **CONSTANT)
    assert process.wait() == 0, process.said
    return runs


@pytest.fixture
def runs(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "runs"))


def done_in(runs: Path) -> Path:
    """The first finished training."""
    return next(p.parent for p in runs.glob("cli/pretrain-*/DONE"))


def same_run(run: Path, other: Path) -> None:
    for name in (
        "model/model.safetensors",
        f"checkpoints/step_{MORE:06d}/optimizer.safetensors",
        f"samples/step_{MORE:06d}.json",
    ):
        assert (run / name).read_bytes() == (other / name).read_bytes(), name
    assert tiny.metrics(run) == tiny.metrics(other)
    for key in ("loss", "validation_loss", "steps", "tokens", "flops"):
        assert read_json(run / "run.json")[key] == read_json(other / "run.json")[key] is not None, key


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_extended_is_straight(stage: str, tmp_path: Path, capsys: Capture) -> None:
    """Guards against a child that lacks moments, order of data, random state or half of its curve: bit for bit, at a constant
    rate; and against sums that count the child alone."""
    straight = go(capsys, tmp_path / "straight", **{**settings(stage), "steps": MORE})
    parent = go(capsys, tmp_path / "runs", **settings(stage))
    before = {p: p.read_bytes() for p in parent.rglob("*") if p.is_file()}
    child = go(capsys, tmp_path / "runs", "--extend", f"steps={MORE}", **settings(stage))
    same_run(child, straight)
    assert child != parent and before == {p: p.read_bytes() for p in parent.rglob("*") if p.is_file()}
    ours, theirs = read_json(child / "run.json"), read_json(parent / "run.json")
    assert ours["extended_from"] == {"run": f"cli/{parent.name}", "step": STEPS}
    assert ours["train_seconds"] > theirs["train_seconds"] and ours["numbers"] == theirs["numbers"]
    assert (1, "extends", parent.name) in [(depth, name, folder.name) for depth, name, folder, _ in lineage(child)]
    shown = tutelage(capsys, "show", child).out
    assert f"extends: {stage}" in shown and parent.name in "".join(shown.split())
    assert go(capsys, tmp_path / "runs", "--extend", f"steps={MORE}", **settings(stage)) == child
    assert len(list((child / "logs").iterdir())) == 1


def test_a_child_is_extended_by_its_name(runs: Path, tmp_path: Path, capsys: Capture) -> None:
    """Guards against a chain that ends after one extension."""
    child = go(capsys, runs, "--extend", "steps=9")
    grandchild = go(capsys, runs, "--extends", child, steps=MORE)
    same_run(grandchild, go(capsys, tmp_path / "straight", steps=MORE))


def test_a_killed_child_resumes_in_the_child(runs: Path, tmp_path: Path, capsys: Capture) -> None:
    """Guards against a child that starts over from its parent when it has a checkpoint of its own, that keeps what its first
    attempt wrote, or that asks for a parent it does not need any more."""
    line = [*tiny.arguments(runs, steps=STEPS, **CONSTANT), "--extend", f"steps={MORE}"]
    said = []
    for place in ({"at": "metrics", "count": 2}, {"at": "update", "count": 3}):
        process = tiny.Process({"argv": line, "die": place, "env": {}})
        assert process.wait() == -signal.SIGKILL, process.said
        said.append(process.said)
    assert all(f"going on after step {STEPS} of {MORE}" in text for text in said)
    shutil.rmtree(done_in(runs) / "checkpoints")
    again = tutelage(capsys, *line)
    assert again.code == 0 and f"resuming after step 8 of {MORE}" in again.err, again.err
    same_run(Path(again.out.strip()), go(capsys, tmp_path / "straight", steps=MORE))


def test_what_differs_is_refused_by_name(runs: Path, capsys: Capture) -> None:
    """Guards against a child under other settings or over other data that bears its parent's curve; the plan says so too."""
    parent = done_in(runs)
    other = tiny.records_folder(runs / "other", tiny.documents()[:30])
    cases: list[tuple[dict[str, Any], str]] = [
        ({"optimizer.beta1": 0.8}, "`optimizer.beta1` is not that of the run to extend"),
        ({"seed": 1}, "`seed` is not that"),
        ({"data": other}, "`data` is not that"),
        ({"steps": STEPS}, "extended only to more steps"),
        ({"steps": 3}, "extended only to more steps"),
        ({"extends": tiny.tokens("documents")}, "not a run folder"),
        ({"extends": "cli/tokens"}, "one of its own stage"),
    ]
    for change, says in cases:
        line = tiny.arguments(runs, **{**CONSTANT, "steps": MORE, "extends": parent, **change})
        for said in (tutelage(capsys, *line, "--dry-run"), tutelage(capsys, *line)):
            assert said.code == 2 and says in said.err, (change, said.err)
    assert not [p for p in runs.glob("cli/pretrain-*") if (p / "checkpoints").exists() and p != parent]


def test_a_refused_extension_leaves_no_run(runs: Path, capsys: Capture) -> None:
    """Guards against a failed run in the list, made by a command that could never have worked."""
    line = [*tiny.arguments(runs, steps=STEPS, **CONSTANT), "--extend", "steps=3"]
    said = tutelage(capsys, *line)
    assert said.code == 2 and "extended only to more steps" in said.err and "fix:" in said.err
    assert [p for p in runs.glob("cli/pretrain-*")] == [done_in(runs)]


def test_nothing_to_go_on_from(runs: Path, capsys: Capture) -> None:
    """Guards against a new run from scratch, or from an older checkpoint, where there is no finished one."""
    line = ["--extend", f"steps={MORE}"]
    said = tutelage(capsys, *tiny.arguments(runs, steps=5, **CONSTANT), *line)
    assert said.code == 2 and "no finished run of these settings" in said.err and "without --extend" in said.err
    parent = done_in(runs)
    facts = read_json(parent / "run.json")
    write_json(parent / "run.json", {**facts, "stopped_early": "no better validation loss"})
    said = tutelage(capsys, *tiny.arguments(runs, steps=STEPS, **CONSTANT), *line, "--dry-run")
    assert said.code == 2 and "stopped early" in said.err
    write_json(parent / "run.json", facts)
    (parent / "checkpoints" / f"step_{STEPS:06d}").rename(parent / "checkpoints" / "step_000004")
    write_json(parent / "checkpoints" / "step_000004" / "progress.json", {"step": 4})
    said = tutelage(capsys, *tiny.arguments(runs, steps=STEPS, **CONSTANT), *line)
    assert said.code == 2 and "lost its last checkpoint" in said.err and "step_000004" in said.err
    (parent / "DONE").unlink()
    said = tutelage(capsys, *tiny.arguments(runs, steps=STEPS, **CONSTANT), *line)
    assert said.code == 2 and "an unfinished one" in said.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["steps=9", "optimizer.lr=1"], "an extension can't change `optimizer.lr`"),
        (["step=9"], "an extension can't change `step`"),
        (["steps=9", "tokens=9000"], "says once how far it goes"),
        (["schedule.name=wsd"], "says once how far it goes"),
        (["steps=many"], "`steps` has a value that does not fit"),
    ],
)
def test_an_extension_says_how_far(words: list[str], says: str, runs: Path, capsys: Capture) -> None:
    """Guards against an extension that quietly becomes another run."""
    more = [x for word in words for x in ("--extend", word)]
    said = tutelage(capsys, *tiny.arguments(runs, steps=STEPS, **CONSTANT), *more, "--dry-run")
    assert said.code == 2 and says in said.err


def test_the_plan_of_a_child(runs: Path, capsys: Capture) -> None:
    """Guards against a plan of the parent, or of all steps instead of those that are left."""
    line = tiny.arguments(runs, steps=STEPS, **CONSTANT)
    plans = [tutelage(capsys, *line, "--extend", f"steps={n}", "--dry-run") for n in (2 * STEPS, 3 * STEPS)]
    plans.append(tutelage(capsys, *tiny.arguments(runs, **{**CONSTANT, "steps": STEPS, "seed": 3}), "--dry-run"))
    assert all(p.code == 0 for p in plans), plans
    assert f"extends: {done_in(runs)}\n" in plans[0].out and f"steps: {2 * STEPS}\n" in plans[0].out
    one, two, scratch = (next(x for x in p.err.splitlines() if "FLOP" in x) for p in plans)
    assert one == scratch and one != two
    assert len(list(runs.glob("cli/pretrain-*"))) == 1


def parent_with(schedule: Schedule) -> extend.ParentRun:
    numbers = {"sequence_length": 64, "batch_tokens": 640, "lr": 0.5, "matrix_lr": 0.25, "embedding_lr": 0.125}
    config = Pretrain(data="x", schedule=schedule, steps=STEPS)
    return extend.ParentRun(Path("runs/cli/base-0123456789ab"), {"numbers": numbers, "steps": STEPS}, config)


def test_what_was_derived_stays() -> None:
    """Guards against a batch and rates that follow the larger budget: another run from step 7 on."""
    parent = parent_with(Schedule())
    longer = Pretrain(data="x", extends="x", steps=5000, size="3m")
    found = hyperparameters.derive_all(longer, 4096, None, None, parent=parent)
    assert {k: found.values[k] for k in parent.numbers} == parent.numbers and found.values["steps"] == 5000
    assert found.because["lr"] == "as in cli/base-0123456789ab" and "lr" not in found.given
    budget = hyperparameters.derive_all(
        longer.model_copy(update={"steps": "derived", "tokens": 64_000.0}), 4096, None, None, parent=parent
    )
    assert budget.values["steps"] == 100


def test_a_rate_that_jumps_is_said(capsys: Capture) -> None:
    """Guards against a decayed run that is thrown back to a high rate without a word."""
    decaying = Pretrain(data="x", schedule=Schedule(name="wsd", decay=0.5))
    extend.say_rate(parent_with(Schedule(name="constant")), decaying, MORE)
    said = capsys.readouterr().err
    assert "was 1.000 of its peak" in said and "0.820 at step 7 of 10" in said and "warning" not in said
    cosine = Schedule(warmup=0)
    extend.say_rate(parent_with(cosine), Pretrain(data="x", schedule=cosine), MORE)
    said = capsys.readouterr().err
    assert "was 0.160 of its peak" in said and "0.411 at step 7 of 10" in said and "jumps up, to 2.6 times" in said


def test_energy_is_of_the_child_alone(tmp_path: Path) -> None:
    """Guards against a chain whose energy counts the parent twice: the report adds up what the runs of a chain took."""
    numbers = text_rows.Hyperparameters(MORE, 64, 10, 2, tiny.RATES)
    parent = parent_with(Schedule())
    parent.facts["train_seconds"] = 60.0
    state = State(tiny.job(tmp_path), Progress(step=MORE, seconds=100.0))
    child = trainer.facts(state, {}, numbers.derived, "test", parent)
    state.progress.seconds = 40.0
    assert (
        child["energy"] == trainer.facts(state, {}, numbers.derived, "test", None)["energy"] and child["train_seconds"] == 100.0
    )


def test_best_weights_come_along(tmp_path: Path) -> None:
    """Guards against a child that stops early and has no best weights to go back to, or that counts its patience from zero."""
    losses = [3.0, 2.0, 2.5, 2.4]
    train(early_stopping(tmp_path / "parent", losses, steps=3))
    child = early_stopping(tmp_path / "child", losses, steps=8)
    child.start_from = tmp_path / "parent" / "checkpoints" / "step_000003"
    state = train(child)
    assert state.progress.step == 4 and "best 2.0000 at step 2" in str(state.stop)
    best = load_file(tmp_path / "parent" / "checkpoints" / "step_000002" / "policy.safetensors")
    assert all(torch.equal(best[n], p) for n, p in policy(child).items())


def test_a_recipe_goes_on_with_the_child(world: World, tmp_path: Path, capsys: Capture) -> None:  # noqa: F811
    """Guards against later stages that still stand on the parent, and against extensions of stages that are not there."""
    runs = Path(shutil.copytree(world.runs, tmp_path / "runs"))
    line = ["run", world.recipe, "--runs", runs]
    for asked, says in (
        ("bse.steps=3", "did you mean `base`?"),
        ("words.steps=3", "does not train"),
        ("base=3", "says which stage goes how far"),
    ):
        said = tutelage(capsys, *line, "--extend", asked)
        assert said.code == 2 and says in said.err, said.err
    planned = tutelage(capsys, *line, "--extend", "base.steps=3", "--dry-run")
    assert planned.code == 0 and "run after base" in planned.err and "base: hit" not in planned.err
    made = api.run(world.recipe, runs=runs, extend={"base.steps": 3})
    assert [n for n in made if made[n].path.name != world.made[n].name] == ["base", "chat"]
    parent = runs / "small" / world.made["base"].name
    assert made["base"].inputs["extends"] == find(str(parent), "run", runs) and made["base"].facts["steps"] == 3
    assert made["chat"].facts["parents"][0]["digest"] == made["base"].facts["artifact"]["digest"]
    said = tutelage(capsys, *line)
    assert said.code == 0 and f"chat: hit, {runs / 'small' / world.made['chat'].name}" in said.err


def test_python_extends(world: World, tmp_path: Path) -> None:  # noqa: F811
    """Guards against an extension that only the command line knows."""
    runs = Path(shutil.copytree(world.runs, tmp_path / "runs"))
    given = load_yaml(world.made["base"] / "config.yaml")[0]
    with pytest.raises(ConfigError, match="does not train"):
        api.tokenizer(data=given["data"], vocab_size=300, runs=runs, extend={"steps": 3})
    base = api.pretrain(runs=runs, **given)
    child = api.pretrain(runs=runs, extend={"steps": 3, "schedule.name": "linear"}, **given)
    assert child.facts["extended_from"] == {"run": f"cli/{base.path.name}", "step": base.facts["steps"]}
