"""Adapters as a user meets them: trained by a stage, used as a model, trained on, merged, refused where they do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.pipeline import TRAIN, World, tutelage, world  # noqa: F401 (a fixture)
from tutelage import api
from tutelage.config.base import build
from tutelage.config.stages import Sft
from tutelage.data.groups.groups import Completion, PromptGroup
from tutelage.errors import ArtifactError, ConfigError
from tutelage.files import read_json
from tutelage.models.interface import Batch
from tutelage.models.open import load
from tutelage.references import find
from tutelage.rundir import RunDir

TUNED = {**TRAIN, "steps": 4, "kernels": True}
Capture = pytest.CaptureFixture[str]


def tune(world: World, runs: Path, adapter: dict[str, Any], **more: Any) -> RunDir:  # noqa: F811
    virtual = {"sequence_length": 108} if adapter.get("kind") in ("prompt", "prefix") else {}  # of the context's 128
    settings = {"model": world.made["base"], "data": world.made["chats"], **TUNED, **virtual, **more}
    return api.sft(runs=runs, adapter=adapter, **settings)  # type: ignore[no-any-return]


def preferences(folder: Path, **settings: Any) -> RunDir:
    """24 questions with a better answer and a worse one."""
    rows = [
        {"prompt": [{"role": "user", "content": f"Where is cat {i}?"}],
         "chosen": [{"role": "assistant", "content": f"By door {i}."}],
         "rejected": [{"role": "assistant", "content": f"The hill {i}!"}]}
        for i in range(24)
    ]  # fmt: skip
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return api.data(kind="preferences", sources=[folder / "pairs.jsonl"], runs=folder, **settings)  # type: ignore[no-any-return]


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    model: Any = load(folder)
    return model.logits(Batch.of([list(range(5, 45))]))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "prompt", "prefix"])
def test_a_run_writes_an_adapter_that_is_used_like_a_model(world: World, tmp_path: Path, capsys: Capture, kind: str) -> None:  # noqa: F811
    """An adapter that nothing but its trainer can use, a base that is stored again, a plan that says nothing of it."""
    run = tune(world, tmp_path, {"kind": kind})
    said = capsys.readouterr().err
    assert "values trained" in said and "adapter" in said
    assert not (run.path / "model").exists() and run.facts["artifact"]["kind"] == "adapter"
    held = load_file(run.path / "checkpoints" / "step_000004" / "policy.safetensors")
    assert held and all(".change." in name or name == "virtual.values" for name in held), "a checkpoint holds the base"
    assert not torch.allclose(logits(run.path / "adapter"), logits(world.made["base"] / "model"), atol=1e-6)
    chat = tutelage(capsys, "chat", run.path, "-m", "Where is cat 1?", "--max-tokens", 4, "--runs", tmp_path)
    assert chat.code == 0, chat.err
    scores = api.evaluate(model=run, questions=world.made["chats"], max_questions=3, max_tokens=4, runs=tmp_path, device="cpu")
    assert scores.facts["correct"]
    (tmp_path / "in.jsonl").write_text('{"prompt": "Where is cat 1?"}\n')
    done = api.generate(model=run, input=tmp_path / "in.jsonl", output=tmp_path / "out.jsonl", max_tokens=4, runs=tmp_path)
    assert done["rows"] == 1 and done["errors"] == 0


@pytest.mark.parametrize("adapter", [{"kind": "lora"}, {"kind": "dora", "quantize": "nf4"}, {"kind": "ia3"}])
def test_merge_writes_the_model_that_was_trained(world: World, tmp_path: Path, adapter: dict[str, Any], capsys: Capture) -> None:  # noqa: F811
    """Promise 14, through the disk; of a base in 4 bits it is the weights of training that are merged."""
    run = tune(world, tmp_path, adapter, optimizer={"lr": 0.05})
    merged = api.merge(adapter=run, runs=tmp_path)
    assert "logits differ by at most" in capsys.readouterr().err and merged.facts["logit_difference"] < 1e-4
    torch.testing.assert_close(logits(merged.path / "model"), logits(run.path / "adapter"), atol=1e-5, rtol=1e-4)
    half = api.merge(adapter=run, dtype="bfloat16", runs=tmp_path)
    assert read_json(half.path / "model" / "config.json")["dtype"] == "bfloat16"
    assert (merged.path / "model" / "tokenizer.json").exists()


def test_an_adapter_is_trained_on(world: World, tmp_path: Path, capsys: Capture) -> None:  # noqa: F811
    """A second run that begins at zero, or on a base that has the first adapter in it twice."""
    first = tune(world, tmp_path, {"kind": "lora", "rank": 4}, optimizer={"lr": 0.02})
    before = logits(first.path / "adapter")
    second = tune(world, tmp_path, {"kind": "lora"}, model=first, optimizer={"lr": 1e-5})
    assert "training on the adapter" in capsys.readouterr().err
    torch.testing.assert_close(logits(second.path / "adapter"), before, atol=5e-3, rtol=1e-3)
    config = read_json(second.path / "adapter" / "adapter_config.json")
    assert config["r"] == 4 and Path(config["base_model_name_or_path"]) == (world.made["base"] / "model").resolve()
    with pytest.raises(ConfigError, match="the adapter that is trained on is another"):
        tune(world, tmp_path, {"kind": "lora", "rank": 8}, model=first)
    whole = tune(world, tmp_path, {}, model=first, optimizer={"lr": 1e-5, "matrix_lr": 1e-5, "embedding_lr": 1e-5})
    assert "the adapter becomes part of its base" in capsys.readouterr().err
    torch.testing.assert_close(logits(whole.path / "model"), before, atol=5e-3, rtol=1e-3)


def test_an_adapter_of_peft_is_trained_on(world: World, tmp_path: Path) -> None:  # noqa: F811
    """What another tool began."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    base = world.made["base"] / "model"
    theirs: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules="all-linear"))
    theirs.save_pretrained(tmp_path / "theirs")
    shutil.copy(base / "tokenizer.json", tmp_path / "theirs")
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(world.made["chat"] / "model" / name, tmp_path / "theirs")
    run = tune(world, tmp_path, {"kind": "lora"}, model=tmp_path / "theirs")
    back = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run.path / "adapter").eval()
    with torch.no_grad():
        got = back(input_ids=torch.arange(5, 45)[None]).logits
    torch.testing.assert_close(got, logits(run.path / "adapter"), atol=1e-4, rtol=1e-3)


def test_an_adapter_without_a_tokenizer_has_its_base_s(world: World, tmp_path: Path, capsys: Capture) -> None:  # noqa: F811
    """`peft` writes none: training, chat and evaluation ended in "no tokenizer here", though the base is named and has one."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = world.made["chat"] / "model"
    theirs: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules="all-linear"))
    theirs.save_pretrained(tmp_path / "theirs")
    assert not (tmp_path / "theirs" / "tokenizer.json").exists()
    run = tune(world, tmp_path, {"kind": "lora"}, model=tmp_path / "theirs")
    assert (run.path / "adapter" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    api.evaluate(model=tmp_path / "theirs", questions=world.made["chats"], max_questions=2, max_tokens=4, runs=tmp_path)
    assert tutelage(capsys, "chat", tmp_path / "theirs", "-m", "Where is cat 3?", "--max-tokens", "4").code == 0
    config = read_json(tmp_path / "theirs" / "adapter_config.json")
    (tmp_path / "theirs" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "gone/away"}))
    said = tutelage(capsys, "chat", tmp_path / "theirs", "-m", "x")
    assert said.code == 2 and "gone/away" in said.err and "no tokenizer here" not in said.err


def test_another_base_is_refused(world: World, tmp_path: Path) -> None:  # noqa: F811
    """An adapter on weights that it was not trained on."""
    run = tune(world, tmp_path, {"kind": "lora"})
    with pytest.raises(ArtifactError, match="made for another base"):
        api.merge(adapter=run, model=world.made["chat"], runs=tmp_path)


def test_a_base_that_was_moved_is_found_through_the_run(world: World, tmp_path: Path) -> None:  # noqa: F811
    """Runs that only work at the place where they were made."""
    shutil.copytree(world.runs, tmp_path / "runs")
    run = api.sft(
        model=tmp_path / "runs" / "small" / world.made["base"].name, data=world.made["chats"], adapter={"kind": "lora"},
        runs=tmp_path / "runs", **TUNED,
    )  # fmt: skip
    (tmp_path / "runs").rename(tmp_path / "moved")
    moved = tmp_path / "moved" / run.path.relative_to(tmp_path / "runs")
    assert logits(find(str(moved), "model", tmp_path).path).shape[1] == 40


@pytest.mark.parametrize(
    ("adapter", "match"),
    [
        ({"kind": "none", "rank": 4}, "`rank` means nothing to an adapter of kind none"),
        ({"kind": "ia3", "rank": 4}, "`rank` means nothing to an adapter of kind ia3"),
        ({"kind": "prompt", "targets": "q_proj"}, "`targets` means nothing"),
        ({"kind": "lora", "tokens": 4}, "`tokens` means nothing"),
        ({"kind": "lora", "init": "vocabulary"}, "no way to begin an adapter of kind lora"),
        ({"kind": "loar"}, "`adapter.kind` has a value that does not fit"),
        ({"kind": "lora", "ranks": 4}, "unknown key `adapter.ranks`"),
    ],
)
def test_settings_that_a_kind_has_no_use_for(adapter: dict[str, Any], match: str) -> None:
    """A setting that is accepted and ignored."""
    with pytest.raises(ConfigError, match=match):
        build(Sft, {"model": "a", "data": "b", "adapter": adapter})


def test_an_adapter_needs_a_base(world: World, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(ConfigError, match="an adapter needs a trained base"):
        api.pretrain(
            data=world.made["corpus"], tokenizer=world.made["words"], size="20k", adapter={"kind": "lora"}, runs=tmp_path, **TUNED
        )


def test_a_preference_run_takes_the_base_as_its_reference(world: World, tmp_path: Path) -> None:  # noqa: F811
    """A reference with the adapter in it, a second model in memory, a run that writes the whole model."""
    data = preferences(tmp_path)
    same = {"data": data, "model": world.made["chat"], "batch": 4, "steps": 2, "threads": 1, "runs": tmp_path, "max_length": 108}
    kinds = {kind: api.preference(adapter={"kind": kind}, **same) for kind in ("none", "lora", "prompt")}
    found = {kind: sorted(run.path.glob("reference/*/logprobs.npy")) for kind, run in kinds.items()}
    assert found["none"] and (kinds["lora"].path / "adapter").is_dir()
    for kind in ("lora", "prompt"):
        for one, other in zip(found["none"], found[kind], strict=True):
            np.testing.assert_allclose(np.load(one), np.load(other), atol=1e-3)


@pytest.mark.parametrize("kind", ["lora", "ia3", "prompt"])
def test_rollouts_are_of_what_is_trained_and_the_reference_is_the_base(world: World, tmp_path: Path, kind: str) -> None:  # noqa: F811
    """Answers of the base, of weights some steps old, a reference that learns too: promise 16 with an adapter."""
    from tutelage.chat.render import Renderer
    from tutelage.config.stages import Rl
    from tutelage.models.adapters.attach import trainable
    from tutelage.records import Message, Prompt
    from tutelage.setup.rollouts import RolloutSetup
    from tutelage.setup.sampling import sync_engine_weights
    from tutelage.setup.trainer import load_start

    folder, cpu = world.made["chat"] / "model", torch.device("cpu")
    config = build(Rl, {
        "model": str(folder), "data": "-", "rewards": {"exact": 1}, "kl": 0.1, "max_tokens": 6, "max_length": 96,
        "adapter": {"kind": kind},
    })  # fmt: skip
    run = RunDir(tmp_path, "rl", "", {"model": find(str(folder), "model", tmp_path)})
    setup = RolloutSetup.of(config, run, load_start(folder, config, cpu), Renderer(folder), cpu, rubric=None)
    with torch.no_grad():
        for i, (_, p) in enumerate(trainable(setup.model)):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.2)
    sync_engine_weights(setup.model, setup.engine)()
    prompt = Prompt.make([Message(role="user", content="Where is cat 1?")], source="test")
    ((made,),) = setup.sampler.answer([prompt], 1, seed=0, step=0, version=0)
    text, at = [*made.prompt_ids, *made.ids], len(made.prompt_ids)
    assert setup.reference is setup.model

    def logprobs(model: Any) -> list[float]:
        with torch.no_grad():
            table = model.eval().logits(Batch.of([text]))[0].log_softmax(-1)
        return [float(table[at - 1 + i, t]) for i, t in enumerate(made.ids)]

    np.testing.assert_allclose(made.logprobs, logprobs(setup.model), atol=1e-4)
    group = PromptGroup("a", np.array(made.prompt_ids), (Completion(np.array(made.ids)),))
    (((found,),),) = (setup.scores(setup.reference, start=True)([group]),)
    base = logprobs(load(folder))
    np.testing.assert_allclose(found, base, atol=1e-4)
    assert not np.allclose(made.logprobs, base, atol=1e-3)


def test_every_stage_that_trains_takes_an_adapter(world: World, tmp_path: Path) -> None:  # noqa: F811
    """A stage that trains everything, or writes the base, although an adapter was asked for; one that takes it and ignores it."""
    data = preferences(tmp_path)
    same: dict[str, Any] = {"model": world.made["chat"], "adapter": {"kind": "lora", "rank": 2}, "runs": tmp_path, "threads": 1}
    rows = {"steps": 2, "sequence_length": 128, "batch_tokens": 512, "evaluate_rows": 2}
    reward = api.reward(data=data, batch=4, steps=2, max_length=128, **same)
    assert (reward.path / "model" / "config.json").exists()
    names = load_file(reward.path / "checkpoints" / "step_000002" / "reward.safetensors").keys()
    assert "score.weight" in names and all(".change." in n or n == "score.weight" for n in names)
    changed = load_file(reward.path / "model" / "model.safetensors")
    assert not any(".change." in name for name in changed)
    distilled = api.distil(teacher=world.made["chat"], data=world.made["chats"], **{**same, "model": world.made["base"]}, **rows)
    adapted = api.adapt(data=world.made["corpus"], max_documents=4, **same, **rows)
    for run in (distilled, adapted):
        assert run.facts["artifact"]["kind"] == "adapter" and not (run.path / "model").exists()
    with pytest.raises(ConfigError, match="no adapter is trained here"):
        api.extend_vocab(data=world.made["corpus"], add=4, **same, **rows)


def test_heads_beside_virtual_tokens_have_a_rate_of_their_own(capsys: Capture) -> None:
    """A head that is trained 1,500 times too fast, as virtual tokens want to be."""
    from tutelage.config.stages import Reward
    from tutelage.setup import answers

    plain = answers.rates(build(Reward, {"model": "a", "data": "b"}), 10**6, 1e-6, heads=True)
    for kind, same in (("prompt", False), ("prefix", False), ("ia3", False), ("lora", True)):
        config = build(Reward, {"model": "a", "data": "b", "adapter": {"kind": kind}})
        found = answers.rates(config, 10**6, 1e-6, heads=True)
        assert (found.embedding_lr == found.matrix_lr == found.lr) == same
        assert same or (found.embedding_lr == plain.embedding_lr and found.lr != plain.lr)
        alone = answers.rates(config, 10**6, 1e-6)
        assert alone.embedding_lr == alone.lr == found.lr, "nothing else is trained: one rate is said"
    assert "set lr" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_a_reward_model_behind_virtual_tokens(world: World, tmp_path: Path, kind: str, capsys: Capture) -> None:  # noqa: F811
    """One that is trained and can't be asked, or trained on; a value function without the adapter of its policy."""
    data = preferences(tmp_path, validation_share=0.3)
    adapter = {"kind": kind, "tokens": 4}
    how: dict[str, Any] = {"adapter": adapter, "runs": tmp_path, "threads": 1, "max_length": 96}
    trained = {"data": data, "batch": 4, "steps": 12, "optimizer": {"lr": 0.02, "embedding_lr": 0.02}}
    made = api.reward(model=world.made["chat"], **trained, **how)
    assert made.facts["artifact"]["kind"] == "adapter" and not (made.path / "model").exists()
    held = load_file(made.path / "checkpoints" / "step_000012" / "reward.safetensors")
    assert held.keys() == {"virtual.values", "score.weight"}
    assert made.facts["held_out"]["accuracy"]["value"] > 0.9
    more = api.reward(model=made, **{**trained, "steps": 1}, **how)
    assert "training on the adapter of" in capsys.readouterr().err
    assert Path(read_json(more.path / "adapter" / "adapter_config.json")["base_model_name_or_path"]).samefile(
        world.made["chat"] / "model"
    )
    for other in ({"kind": "none"}, {"kind": "lora"}, {"kind": kind, "tokens": 5}):
        with pytest.raises(ConfigError, match="wears virtual tokens, which can't be merged"):
            api.reward(model=made, **trained, **{**how, "adapter": other})
    asked = {"model": world.made["chat"], "data": world.made["chats"], "samples": 2, "max_tokens": 4, "runs": tmp_path}
    judged = api.sample(reward_model=more, rewards={"model": 1}, max_prompts=2, **asked)
    assert len((judged.path / "records" / "train.jsonl").read_text().splitlines()) == 2 * 2
    ppo = api.rl(reward_model=made, rewards={"model": 1}, method="ppo", batch=2, steps=1, probes=2, **{**asked, **how})
    held = load_file(ppo.path / "checkpoints" / "step_000001" / "value.safetensors")
    assert held.keys() == {"virtual.values", "score.weight"}


def test_a_base_that_never_read_the_end_of_a_turn_is_told(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    """An adapter that can't learn to stop, since the table it writes from is frozen: said before the first step, with the
    setting; not of a base that has read it."""
    how: dict[str, Any] = {"data": world.made["chats"], "runs": tmp_path, "steps": 1, "sequence_length": 128, "batch_tokens": 256}
    unread, lora = "hardly read the token that ends a turn", {"kind": "lora", "rank": 2}
    api.sft(model=world.made["base"], adapter=lora, **how)
    assert unread in capsys.readouterr().err
    api.sft(model=world.made["base"], adapter={**lora, "embeddings": True}, **how)
    api.sft(model=world.made["base"], **how)
    assert unread not in capsys.readouterr().err
    chat = api.sft(model=world.made["base"], optimizer={"lr": 1e-2, "embedding_lr": 1e-2}, **{**how, "steps": 30})
    api.sft(model=chat, adapter=lora, **how)
    assert unread not in capsys.readouterr().err
