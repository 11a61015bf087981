"""Promises 6, 7, 13 and 15 where each rank holds some rows of every tensor (`shard=full`). Real processes over gloo."""

from __future__ import annotations

import functools
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.guarantees import tiny
from tutelage import log
from tutelage.config.train import Train
from tutelage.errors import ArtifactError, TrainingStopped
from tutelage.files import read_json, write_json
from tutelage.models.export import save
from tutelage.models.interface import Batch
from tutelage.models.shard import is_sharded, local, shard, whole
from tutelage.objectives import Objective, Term
from tutelage.objectives.next_token import next_token
from tutelage.setup import trainer
from tutelage.train import checkpoint, distributed, hooks
from tutelage.train.loop import Job, train
from tutelage.train.step import StepConfig, measure
from tutelage.train.watch import UpdateWatch

CASES = {f"{name}-{'tied' if tied else 'untied'}": (name, tied) for name in ("adamw", "muon") for tied in (True, False)}
CPU = torch.device("cpu")


def job(folder: Path, case: str, world: int = 1) -> Job:
    """Four steps of four micro-batches on one rank, of two on each of two. Of 49 rows one rank gets 25, the other 24."""
    name, tied = CASES[case]
    model = tiny.model(tie_word_embeddings=tied, intermediate_size=49)
    if world > 1:
        shard(model, CPU)
    validate = hooks.Validate(tiny.source(micro_rows=1).next(9).micro[:2], {"tokens": 9.0}, every=2)
    stop = hooks.EarlyStop(validate, patience=9, folder=folder / "best")
    return tiny.job(
        folder, steps=4, parts={"policy": model}, data=tiny.source(rank=log.rank(), world=world, micro_rows=1), optimizer=name,
        checkpoint_every=2, hooks={"record": hooks.Record(), "validate": validate, "early_stop": stop},
    )  # fmt: skip


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in model.named_parameters()}


@functools.cache
def alone(case: str) -> Path:
    """The run of one rank, with its `model/`."""
    folder = tiny.home() / f"alone-{case}"
    made = job(folder, case)
    train(made)
    save(made.recipe.parts["policy"], folder / "model")
    return folder


def model_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


# What both ranks do, in one pair of processes


def on_both_ranks(folder: str) -> None:
    distributed.start("cpu")
    for case in CASES:
        train_shards(Path(folder) / case, case)
    train_shards(Path(folder) / "begun", "muon-untied")
    for failing in (move_one_row, poison_loss, poison_gradient):
        try:
            failing(Path(folder))
        except TrainingStopped as error:
            (Path(folder) / f"{failing.__name__}_{log.rank()}.txt").write_text(str(error), encoding="utf-8")
    distributed.stop()


def train_shards(folder: Path, case: str) -> None:
    made = job(folder, case, world=2)
    train(made)
    model, state = made.recipe.parts["policy"], made.optimizers.state_tensors()
    measure(made.recipe, tiny.source().next(0).micro[:1], {"tokens": 1.0})  # leaves nothing whole
    here, all_of_it = (
        {"weights": sum(f(p).nbytes for p in model.parameters()), "state": sum(f(x).nbytes for x in state.values())}
        for f in (local, whole)
    )
    write_json(folder / f"held_{log.rank()}.json", {"here": here, "whole": all_of_it})
    save(model, folder / "model")


def move_one_row(folder: Path) -> None:
    model = tiny.model()
    model.model.norm.weight.requires_grad_(False)
    shard(model, CPU)
    watch = UpdateWatch({"policy": model})
    with torch.no_grad():
        local(model.model.norm.weight)[0] += float(log.rank() == 1)
    watch.check_frozen()


def poison_loss(folder: Path) -> None:
    model = tiny.model()
    shard(model, CPU)
    data = tiny.Poisoned(tiny.source("conversations", rank=log.rank(), world=2), at=2, rank=1)
    train(tiny.job(folder / "loss", parts={"policy": model}, data=data))


def poison_gradient(folder: Path) -> None:
    model, data = tiny.model(), tiny.source("conversations", rank=log.rank(), world=2)
    shard(model, CPU)
    bad = data.next(0).micro[0].ids[1] if log.rank() == 1 else torch.tensor(-1)

    def overflowing(parts: dict[str, nn.Module], batch: Batch) -> dict[str, Term]:
        terms = next_token(parts, batch)
        zero = (model.model.norm.weight[0] * 0.0).clamp(min=0.0)
        extra = zero.sqrt() if (batch.ids == bad).all(1).any() else zero  # 0, with an infinite slope times 0
        return {"loss": Term(terms["loss"].sum + extra, "tokens")}

    train(
        tiny.job(
            folder / "gradient",
            parts={"policy": model},
            data=data,
            recipe=StepConfig({"policy": model}, Objective("overflowing", overflowing)),
        )
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what `on_both_ranks` did; `begun/` had a checkpoint of one rank at step 2."""
    folder = tmp_path_factory.mktemp("shards")
    begun = folder / "begun" / "checkpoints" / "step_000002"
    shutil.copytree(alone("muon-untied") / "checkpoints" / "step_000002", begun)
    pair = [tiny.Process({"call": on_both_ranks, "args": [str(folder)], "env": env, "die": {}}) for env in tiny.ranks(2)]
    assert [p.wait() for p in pair] == [0, 0], [p.said for p in pair]
    return folder


# What came of it


@pytest.mark.parametrize("case", CASES)
def test_two_sharded_ranks_train_the_model_of_one(made: Path, case: str) -> None:
    """Guards against averaged or doubled gradients, a norm of a part (and so another clipping), momentum orthogonalised in
    pieces, a tied head that is cut twice, stale whole weights after a validation, and metrics written twice."""
    assert tiny.furthest(model_of(alone(case)), model_of(made / case)) < 1e-5
    rows, expected = tiny.metrics(made / case), tiny.metrics(alone(case))
    assert [r.keys() for r in rows] == [r.keys() for r in expected]
    for row, wanted in zip(rows, expected, strict=True):
        assert all(abs(row[k] - wanted[k]) <= 2e-5 * abs(wanted[k]) for k in wanted), (row, wanted)


@pytest.mark.parametrize("case", CASES)
def test_each_rank_holds_half(made: Path, case: str) -> None:
    """Guards against shards in name: whole copies of weights or optimizer state on every rank."""
    held = [read_json(made / case / f"held_{rank}.json") for rank in (0, 1)]
    for what in ("weights", "state"):
        assert sum(h["here"][what] for h in held) == pytest.approx(held[0]["whole"][what], rel=0.01)
        assert all(0.48 < h["here"][what] / h["whole"][what] < 0.52 for h in held)


def test_a_checkpoint_of_shards_goes_on_on_one_rank(made: Path, tmp_path: Path) -> None:
    """Guards against shards that only as many ranks can read, and against rows put together in another order."""
    shutil.copytree(made / "muon-tied" / "checkpoints" / "step_000002", tmp_path / "checkpoints" / "step_000002")
    names = {p.name for p in (tmp_path / "checkpoints" / "step_000002").iterdir()}
    files = {f"{part}-0000{n}-of-00002.safetensors" for part in ("policy", "optimizer") for n in (1, 2)}
    assert names == files | {"policy.safetensors.index.json", "optimizer.safetensors.index.json", "progress.json"}
    going_on = job(tmp_path, "muon-tied")
    train(going_on)
    assert tiny.furthest(model_of(alone("muon-tied")), weights(going_on.recipe.parts["policy"])) < 1e-5
    assert [r["step"] for r in tiny.metrics(tmp_path) if "loss" in r] == [3, 4]


def test_a_checkpoint_of_one_rank_goes_on_in_shards(made: Path) -> None:
    """Guards against whole tensors copied where rows belong, and against a run that starts anew."""
    assert tiny.furthest(model_of(alone("muon-untied")), model_of(made / "begun")) < 1e-5
    assert [r["step"] for r in tiny.metrics(made / "begun") if "loss" in r] == [3, 4]


def test_a_missing_shard_is_named(made: Path, tmp_path: Path) -> None:
    """Guards against half a model that is loaded as if it were whole."""
    folder = shutil.copytree(made / "adamw-tied" / "checkpoints" / "step_000004", tmp_path / "copy")
    (folder / "policy-00002-of-00002.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"(?s)1 of 2 files of a checkpoint are missing.*policy-00002-of-00002"):
        checkpoint.load_weights(folder / "policy.safetensors", tiny.model(intermediate_size=49))


def test_a_frozen_row_that_moves_on_one_rank_stops_all(made: Path) -> None:
    """Guards against a rank that stops, or goes on, alone: only rank 1 holds the row that moved."""
    said = [(made / f"move_one_row_{rank}.txt").read_text(encoding="utf-8") for rank in (0, 1)]
    assert all("1 frozen tensors changed" in text and "policy.model.norm.weight" in text for text in said)


@pytest.mark.parametrize(("what", "step", "row"), [("loss", 2, 1), ("gradient", 0, 1)])
def test_a_bad_row_is_named_by_the_rank_that_has_it(made: Path, what: str, step: int, row: int) -> None:
    """Guards against ranks that wait for one another's layers while they look for the row, and against blaming rows whose
    gradient was sound before it was added to a bad one."""
    said = [(made / f"poison_{what}_{rank}.txt").read_text(encoding="utf-8") for rank in (0, 1)]
    assert all(f"the {what} of step {step} is not finite" in text for text in said)
    folder = made / what / "failure" / f"step_{step:06d}"
    assert [p.name for p in folder.iterdir()] == ["rank_1"]
    facts = read_json(folder / "rank_1" / "failure.json")
    assert (facts["micro_batch"], facts["rows"]) == (0, [row])
    assert all(name in text for name in facts["records"][0] for text in said)


def test_killed_in_shards_goes_on_on_any_ranks(tmp_path: Path) -> None:
    """Guards against a checkpoint that appears while a rank's part is missing, and against state that belongs to a number of
    ranks: a real run whose rank 1 dies while it writes its part of step 6 goes on after step 4, on one rank, on two that
    replicate, and on two with shards; each ends with the weights of the run that nothing disturbed."""
    die = {"at": "shard", "count": 6, "rank": 1}
    pair = [tiny.start(tmp_path / "killed", env=env, die=die, shard="full") for env in tiny.ranks(2)]
    assert pair[1].wait() == -signal.SIGKILL and pair[0].wait() not in (0, 3), [p.said for p in pair]
    assert "each of 2 ranks holds its rows of every tensor" in pair[0].said
    for name, count, how in (("one", 1, "full"), ("copies", 2, "none"), ("shards", 2, "full")):
        shutil.copytree(tmp_path / "killed", tmp_path / name)
        environments = tiny.ranks(count) if count > 1 else [{}]
        ranks = [tiny.start(tmp_path / name, env=env, shard=how) for env in environments]
        assert [p.wait() for p in ranks] == [0] * count, [p.said for p in ranks]
        assert "resuming after step 4 of 10" in ranks[0].said
        run = tiny.run_folder(tmp_path / name)
        assert tiny.furthest(model_of(tiny.straight()), model_of(run)) < 1e-5
        assert [r["step"] for r in tiny.metrics(run)] == [r["step"] for r in tiny.metrics(tiny.straight())]
        sampled = [p.name for p in (tiny.straight() / "samples").iterdir()]
        assert sorted(p.name for p in (run / "samples").iterdir()) == sorted(sampled)


def test_one_rank_has_nothing_to_shard(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a process group of one, or a setting that is ignored in silence."""
    model = tiny.model()
    trainer.place(model, Train(shard="full"), CPU)
    assert not is_sharded(model) and type(model.lm_head.weight) is nn.Parameter
    assert "shard: full changes nothing" in capsys.readouterr().err
