"""The promises for methods that learn from answers: resume, accumulation, layouts, ranks, agreement of trainer and engine."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.guarantees import answers, tiny
from tests.pipeline import tutelage
from tutelage.config.stages import Rl
from tutelage.errors import ConfigError, RewardError
from tutelage.files import read_json
from tutelage.models.open import load
from tutelage.models.scorer import build_scorer
from tutelage.models.scorer_export import save_scorer
from tutelage.rollout.source import read_rollouts

CLOCKS = ("rollout/rollout_seconds", "rollout/generated_per_second")


def same(run: Path, other: Path) -> None:
    """Weights, optimizer state, metrics and rollouts, bit for bit."""
    last = max(p.name for p in (run / "checkpoints").iterdir())
    for name in ("model/model.safetensors", f"checkpoints/{last}/optimizer.safetensors"):
        assert (run / name).read_bytes() == (other / name).read_bytes(), name
    rows = [[{k: v for k, v in row.items() if k not in CLOCKS} for row in tiny.metrics(r)] for r in (run, other)]
    assert rows[0] == rows[1]
    files = [sorted((r / "rollouts").glob("*.jsonl")) for r in (run, other)]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]


@pytest.mark.parametrize("name", list(answers.STAGES))
def test_killed_and_resumed_is_never_killed(tmp_path: Path, name: str) -> None:
    """Promise 7. Guards against rollouts that are made again by other weights, noise that goes on from where it was, references
    and values that were never saved. Killed in the middle of an iteration, and before a checkpoint."""
    straight = answers.start(name, tmp_path / "straight")
    assert straight.wait() == 0, straight.said
    for die in ({"at": "update", "count": 4}, {"at": "checkpoint", "count": 1}):
        killed = answers.start(name, tmp_path / "killed", die=die)
        assert killed.wait() == -signal.SIGKILL, killed.said
    last = answers.start(name, tmp_path / "killed")
    assert last.wait() == 0, last.said
    assert "resuming after step" in last.said
    same(answers.folder(name, tmp_path / "killed"), answers.folder(name, tmp_path / "straight"))


@pytest.mark.parametrize("name", list(answers.STAGES))
def test_micro_batches_and_layouts_change_nothing(tmp_path: Path, name: str) -> None:
    """Promises 5 and 6: one large forward pass, many small ones, and padded rows give one model, to rounding."""
    small = answers.run(name, tmp_path / "a", steps=2)
    for i, change in enumerate(({"micro_tokens": 100_000}, {"layout": "rows"}, {"layout": "packed", "micro_tokens": 1})):
        other = answers.run(name, tmp_path / f"b{i}", steps=2, **change)
        weights = [load_file(r.path / "model" / "model.safetensors") for r in (small, other)]
        assert tiny.furthest(*weights) < 2e-4, change


@pytest.mark.parametrize("name", list(answers.STAGES))
def test_two_ranks_are_one(tmp_path: Path, name: str) -> None:
    """Promise 6 over ranks: the prompts of a batch are shared out, and the sums are those of one process."""
    pair = [answers.start(name, tmp_path / "two", env=env, steps=2) for env in tiny.ranks(2)]
    assert [p.wait() for p in pair] == [0, 0], [p.said for p in pair]
    alone = answers.run(name, tmp_path / "one", steps=2)
    weights = [load_file(r / "model" / "model.safetensors") for r in (answers.folder(name, tmp_path / "two"), alone.path)]
    assert tiny.furthest(*weights) < 2e-4


def test_what_is_measured_of_rollouts_is_of_all_ranks(tmp_path: Path) -> None:
    """Guards against numbers of the first rank alone: its half of the divergence, and half of the speed."""
    change = {"steps": 4, "updates": 1}
    pair = [answers.start("reused", tmp_path / "two", env=env, **change) for env in tiny.ranks(2)]
    assert [p.wait() for p in pair] == [0, 0], [p.said for p in pair]
    alone = answers.run("reused", tmp_path / "one", **change)
    two, one = (
        [r for r in tiny.metrics(run) if "rollout/kl" in r] for run in (answers.folder("reused", tmp_path / "two"), alone.path)
    )
    assert len(one) == len(two) == 4 and one[-1]["rollout/kl"] > 1e-4
    for a, b in zip(one, two, strict=True):
        for name in ("kl", "mismatch_mean", "mismatch_max", "mismatch_kl", "reward", "length", "zero_variance_share"):
            assert b[f"rollout/{name}"] == pytest.approx(a[f"rollout/{name}"], rel=1e-3, abs=1e-6), name
    for rows, run in ((one, alone.path), (two, answers.folder("reused", tmp_path / "two"))):
        for row, step in zip(rows, range(4), strict=True):
            files = (run / "rollouts").glob(f"step_{step:06d}*.jsonl")
            made = sum(sum(r.mask) for file in files for r in read_rollouts(file))
            assert row["rollout/generated_per_second"] * row["rollout/rollout_seconds"] == pytest.approx(made)


def test_more_ranks_than_prompts_is_refused(tmp_path: Path) -> None:
    """Guards against a rank with nothing to ask, which adds up other numbers than the rest and hangs them."""
    pair = [answers.start("grpo", tmp_path, env=env, batch=1) for env in tiny.ranks(2)]
    assert [p.wait() for p in pair] == [2, 2], [p.said for p in pair]
    assert "fewer prompts in an iteration than ranks" in pair[0].said


def test_trainer_and_engine_agree(tmp_path: Path) -> None:
    """Promise 16: log-probabilities of the same tokens, by the engine that made them and by the trainer; bounded and written."""
    run = answers.run("reused", tmp_path)
    rows = [r for r in tiny.metrics(run.path) if "rollout/mismatch_max" in r]
    assert rows and all(r["rollout/mismatch_max"] < 1e-4 for r in rows)


def test_agreement_is_logged_without_being_asked_for(tmp_path: Path) -> None:
    """Promise 16 for a run as it comes: in the first step of an iteration nothing has moved yet but by rounding."""
    rows = [r for r in tiny.metrics(answers.run("grpo", tmp_path, minibatches=2).path) if "term/moved" in r]
    assert len(rows) == 6 and all(r["term/moved"] < 1e-4 for r in rows[::2]) and rows[1]["term/moved"] > 1e-4


def test_cut_answers_that_teach_nothing_say_so(tmp_path: Path) -> None:
    """Guards against rollouts that look used, and whose advantage no token got."""
    run = answers.run("grpo", tmp_path, truncated="mask", max_tokens=3, steps=2)
    rollouts = [r for f in (run.path / "rollouts").glob("*.jsonl") for r in read_rollouts(f)]
    cut = [r for r in rollouts if r.finish_reason == "length"]
    assert cut and all(not r.used and r.meta["left_out"] == "cut at max_tokens" for r in cut)
    assert all(r.used for r in rollouts if r.finish_reason != "length")


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_the_penalty_in_rewards_knows_every_estimator(tmp_path: Path, method: str) -> None:
    """Guards against an estimator that is refused, or that changes nothing, where the divergence is taken off rewards."""
    how = {"method": method, "kl": 0.5, "kl_in": "reward", "steps": 3}
    runs = {kind: answers.run("grpo", tmp_path / str(kind), kl_estimator=kind, **how) for kind in (None, "k1", "k2", "k3")}
    weights = {kind: load_file(run.path / "model" / "model.safetensors") for kind, run in runs.items()}
    assert tiny.furthest(weights[None], weights["k1"]) == 0
    assert all(tiny.furthest(weights["k1"], weights[kind]) > 0 for kind in ("k2", "k3"))


def test_every_rollout_is_written(tmp_path: Path) -> None:
    """Guards against answers that nobody can look at: each with its ids, rewards by term, advantage, and why it was left out."""
    run = answers.run("grpo", tmp_path, zero_variance="skip")
    files = sorted((run.path / "rollouts").glob("*.jsonl"))
    assert [f.stem for f in files] == [f"step_{i:06d}" for i in range(6)]
    for file in files:
        rollouts = read_rollouts(file)
        assert len(rollouts) == 16
        for r in rollouts:
            assert len(r.ids) == len(r.logprobs) == len(r.mask) > 0 and set(r.terms) == {"letters", "short"}
            assert r.reward == pytest.approx(sum(r.terms.values())) and r.advantage is not None
            assert r.used or r.meta["left_out"] == "no signal in the group"
    facts = read_json(run.path / "run.json")
    assert facts["held_out_gain"]["n"] == 4 and 0 <= facts["rollouts"]["zero_variance_share"] <= 1


def test_resumed_on_two_ranks_within_an_iteration(tmp_path: Path) -> None:
    """Guards against rollouts of one rank that the other goes on with: two ranks are killed in the middle of an iteration, and go
    on as if they had not been."""
    straight = [answers.start("ppo", tmp_path / "straight", env=env) for env in tiny.ranks(2)]
    assert [p.wait() for p in straight] == [0, 0], [p.said for p in straight]
    pair = [
        answers.start("ppo", tmp_path / "killed", env=env, die={"at": "update", "count": 4, "rank": 1}) for env in tiny.ranks(2)
    ]
    assert pair[1].wait() == -signal.SIGKILL and pair[0].wait() != 0
    again = [answers.start("ppo", tmp_path / "killed", env=env) for env in tiny.ranks(2)]
    assert [p.wait() for p in again] == [0, 0], [p.said for p in again]
    assert "resuming after step 2" in again[0].said
    weights = [load_file(answers.folder("ppo", tmp_path / n) / "model" / "model.safetensors") for n in ("straight", "killed")]
    assert tiny.furthest(*weights) == 0


@pytest.mark.parametrize(("first", "then"), [(4, 2), (2, 4)])
def test_a_run_goes_on_with_other_probes(tmp_path: Path, first: int, then: int) -> None:
    """Guards against a crash after the last step, where as many answers before as after were taken for granted."""
    killed = answers.start("grpo", tmp_path, die={"at": "update", "count": 4}, probes=first)
    assert killed.wait() == -signal.SIGKILL, killed.said
    last = answers.start("grpo", tmp_path, probes=then)
    assert last.wait() == 0 and "resuming after step" in last.said, last.said
    run = answers.folder("grpo", tmp_path)
    kept = [[r.reward for r in read_rollouts(run / "probes" / f"step_{n:06d}.jsonl")] for n in (0, 6)]
    assert [len(k) for k in kept] == [first, then] and "the first 2 of them are compared" in last.said
    gain = read_json(run / "run.json")["held_out_gain"]
    assert gain["n"] == 2
    assert gain["value"] == pytest.approx(sum(b - a for a, b in zip(*kept, strict=False)) / 2)  # type: ignore[operator]


def test_minibatches_without_a_group_are_steps(tmp_path: Path) -> None:
    """Guards against a crash where `zero_variance=skip` leaves fewer groups than minibatches."""
    rewards = {"letters": {"kind": "regex", "pattern": "(?s).*e.*"}}
    run = answers.run("grpo", tmp_path, zero_variance="skip", minibatches=4, samples=2, rewards=rewards, steps=8)
    assert read_json(run.path / "run.json")["steps"] == 8


@pytest.mark.parametrize(
    ("change", "field"),
    [({"samples": 1}, "samples"), ({"gamma": 0.9}, "gamma"), ({"penalty": 2.0}, "penalty"), ({"patience": 2}, "patience"),
     ({"shard": "full"}, "shard"), ({"kl_in": "reward"}, "kl_in")],
)  # fmt: skip
def test_settings_that_change_nothing_are_refused(tmp_path: Path, change: dict[str, object], field: str) -> None:
    """Guards against a run that ends well and has learnt nothing, or not what was asked for."""
    with pytest.raises(ConfigError) as caught:
        answers.run("grpo", tmp_path, **change)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("method", "change", "expected"),
    [("grpo", {"value_clip": 0.1}, "clip_low, clip_high, delta, kl, kl_estimator, entropy, temperature"),
     ("cispo", {"delta": 3.0}, "clip_low, clip_high, kl, kl_estimator, entropy, temperature"),
     ("reinforce", {"clip_low": 0.1}, "kl, kl_estimator, entropy, temperature")],
)  # fmt: skip
def test_settings_are_called_as_the_stage_calls_them(
    tmp_path: Path, method: str, change: dict[str, object], expected: str
) -> None:
    """Guards against an error that tells a user to set `kl_weight`, which no command knows."""
    with pytest.raises(ConfigError) as caught:
        answers.run("grpo", tmp_path, method=method, **change)
    assert [caught.value.field] == list(change) and caught.value.expected == f"one of: {expected}"
    assert set(expected.split(", ")) <= set(Rl.model_fields)


def test_a_reward_of_the_prompt_is_refused_where_groups_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a check that looks at all rewards together: these differ between prompts only, which is nothing to GRPO."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text(
        "def even(rollout):\n    return rollout.prompt_ids[-1] % 2 + sum(rollout.prompt_ids) % 5\n"
    )
    rewards = {"even": {"kind": "function", "path": "my_rewards.py:even"}}
    with pytest.raises(RewardError, match="in none of 8 groups of 4 answers"):
        answers.run("grpo", tmp_path / "a", rewards=rewards)
    for method in ("reinforce", "ppo"):
        assert (
            read_json(answers.run("grpo", tmp_path / method, method=method, rewards=rewards, steps=1).path / "run.json")["steps"]
            == 1
        )


def test_the_plan_names_every_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards promise 11 where there are several models: before the first step, and in a dry run."""
    rewards = {"model": 1}
    scorer = build_scorer(load(tiny.checkpoint()), 1, 0)
    save_scorer(scorer, tmp_path / "scorer", tiny.checkpoint())
    change = {"rewards": rewards, "reward_model": str(tmp_path / "scorer"), "steps": 1}
    run = answers.run("ppo", tmp_path, **change)
    said = _memory(run.path)
    size = sum(p.nbytes for p in load(tiny.checkpoint()).parameters())
    assert f"{size / 1e6:,.0f} reference" in said and f"{size / 1e6:,.0f} reward model" in said
    assert " value" in said and " cache of rollouts" in said
    run = answers.run("grpo", tmp_path / "grpo", steps=1)
    said = _memory(run.path)
    assert " cache of rollouts" in said and " value" not in said and " reference" not in said
    values = {**answers.settings("ppo", **change), "stage": None}
    line = ["rl", "--dry-run", *(x for k, v in values.items() if v for x in ("--set", f"{k}={json.dumps(v)}"))]
    shown = tutelage(capsys, *line)
    assert all(f" {name}" in shown.err for name in ("value", "reference", "reward model")), shown.err


def _memory(run: Path) -> str:
    (line,) = [x for x in (run / "logs" / "attempt_1.log").read_text(encoding="utf-8").splitlines() if " memory: " in x]
    return line
