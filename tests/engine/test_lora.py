"""Several adapters on one base in one batch: each answer is the one that `peft` gives with that adapter alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.models.shapes import SHAPE, reference
from tutelage.engine import Engine, Sampling
from tutelage.engine.runner import CachedRunner, FusedRunner
from tutelage.errors import ArtifactError
from tutelage.models import kernels
from tutelage.models.adapters.lora import Lora, read_lora
from tutelage.models.open import load

GREEDY = Sampling(10, temperature=0, logprobs=0)
BASES: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3", **SHAPE, "head_dim": 16},
    "gpt2": {"model_type": "gpt2", "vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256},
    "phi3": {"model_type": "phi3", **SHAPE, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
             "original_max_position_embeddings": 256, "max_position_embeddings": 256},
    "gpt_neox": {"model_type": "gpt_neox", "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                 "intermediate_size": 48, "max_position_embeddings": 256},
}  # fmt: skip
WAYS: list[dict[str, Any]] = [{"r": 4}, {"r": 16, "use_rslora": True, "lora_alpha": 24}, {"r": 20}]


class Made:
    """A base folder, adapters of it that `peft` wrote, and what `peft` says with each."""

    def __init__(self, case: str, folder: Path) -> None:
        self.base, self.folders, self.theirs = folder / "base", [], []
        hf = reference({**BASES[case], "max_position_embeddings": 256} if case == "qwen3" else BASES[case])
        hf.save_pretrained(self.base)
        for i, how in enumerate(WAYS):
            self.theirs.append(adapted(self.base, folder / f"adapter{i}", seed=i, **how))
            self.folders.append(folder / f"adapter{i}")
        self.theirs.append(type(hf).from_pretrained(self.base).eval())

    def engine(self, **how: Any) -> tuple[Engine, list[Lora | None]]:
        model = load(self.base)
        return Engine(model, **how), [*(read_lora(folder, model) for folder in self.folders), None]


def adapted(base: Path, folder: Path, seed: int, **how: Any) -> Any:
    """A model of `peft` whose adapter changes what the base says, saved to `folder`."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **{"target_modules": "all-linear", **how})
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model.eval()


@pytest.fixture(scope="module", params=BASES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made("qwen3", tmp_path_factory.mktemp("qwen3"))


def prompts() -> list[list[int]]:
    g = torch.Generator().manual_seed(3)
    return [torch.randint(3, 97, (n,), generator=g).tolist() for n in (5, 12, 30, 140)]


def expected(theirs: Any, ids: list[int], count: int) -> tuple[list[int], np.ndarray]:
    """Greedy continuation and the log-probabilities of its tokens."""
    prompt = torch.tensor([ids])
    with torch.no_grad():
        out = theirs.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=count, eos_token_id=None
        )
        logprobs = theirs(input_ids=out).logits[0].log_softmax(-1)
    new = out[0, len(ids) :].tolist()
    return new, np.array([float(logprobs[len(ids) - 1 + i, t]) for i, t in enumerate(new)])


@pytest.mark.parametrize("compiled", [True, False])
def test_a_mixed_batch_equals_peft(made: Made, compiled: bool) -> None:
    """Every prompt with every adapter and with none, all in one batch; prompts of 140 tokens go another way than short ones."""
    if not compiled:
        with kernels.disabled():
            engine, loras = made.engine()
    else:
        engine, loras = made.engine()
    pairs = [(ids, lora, theirs) for ids in prompts() for lora, theirs in zip(loras, made.theirs, strict=True)]
    done = engine.generate([ids for ids, _, _ in pairs], GREEDY, [lora for _, lora, _ in pairs])
    answers = set()
    for (ids, lora, theirs), got in zip(pairs, done, strict=True):
        new, logprobs = expected(theirs, ids, 10)
        assert list(got.ids) == new
        np.testing.assert_allclose([s.logprob for s in got.scores], logprobs, atol=1e-4)
        np.testing.assert_allclose(engine.score([([*ids, *new], len(ids))], lora)[0], logprobs, atol=1e-4)
        answers.add(got.ids)
    assert len(answers) > len(prompts()), "the adapters change nothing"


def test_beams_wear_their_prompts_adapter(made: Made) -> None:
    """A fork that goes on without what its prompt wears."""
    engine, loras = made.engine()
    pairs = [(ids, lora, theirs) for ids in prompts()[:2] for lora, theirs in zip(loras, made.theirs, strict=True)]
    done = engine.generate([ids for ids, _, _ in pairs], Sampling(8, beams=3), [lora for _, lora, _ in pairs])
    for (ids, _, theirs), got in zip(pairs, done, strict=True):
        prompt = torch.tensor([ids])
        out = theirs.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, num_beams=3, max_new_tokens=8,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert list(got.ids) == out[0, len(ids) :].tolist()


def test_the_fused_call_takes_adapters(qwen3: Made) -> None:
    """The mixed batch above must have been one call of the kernels, not one for each adapter."""
    engine, loras = qwen3.engine(batch_invariant=True)
    assert isinstance(engine.runner, FusedRunner) and engine.runner.long is None
    calls: list[int] = []
    fused = engine.runner._fused
    engine.runner._fused = lambda work: calls.append(len({w.sequence.lora for w in work})) or fused(work)  # type: ignore[method-assign,func-returns-value]
    together = engine.generate([prompts()[1]] * 4, GREEDY, loras)
    assert max(calls) == 4
    for lora, got in zip(loras, together, strict=True):
        alone = engine.generate([prompts()[1]], GREEDY, lora)[0]
        assert [s.logprob for s in alone.scores] == [s.logprob for s in got.scores], "company changed an answer's bits"


def test_keys_of_one_adapter_are_never_anothers(qwen3: Made) -> None:
    """Same prompt, prefix cache on: with another adapter its keys and values are others, and must be read anew."""
    engine, loras = qwen3.engine()
    prompt = prompts()[2]
    for lora in (None, loras[0], loras[1], None):
        fresh, _ = engine.score([(prompt, 1)], lora)[0], engine.generate([prompt], Sampling(1, temperature=0), lora)
        got = engine.generate([prompt], GREEDY, lora)[0]
        assert got.shared == len(prompt) - 1, "the second time it is all there"
        again = engine.score([([*prompt, *got.ids], len(prompt))], lora)[0]
        np.testing.assert_allclose([s.logprob for s in got.scores], again, atol=1e-4)
        assert len(fresh) == len(prompt) - 1


def test_weights_may_change_in_place(qwen3: Made) -> None:
    """Training publishes an adapter by writing into its tensors; ranks that had to be filled up are copies inside the engine."""
    engine, loras = qwen3.engine()
    for lora in loras[:2]:  # rank 4 is filled up, rank 16 is read where it lies
        assert lora is not None
        before = engine.generate([prompts()[0]], GREEDY, lora)[0]
        for part in lora.parts.values():
            part.b.mul_(-1.5)
        engine.weights_changed()
        after = engine.generate([prompts()[0]], GREEDY, lora)[0]
        scored = engine.score([([*prompts()[0], *after.ids], 5)], lora)[0]
        np.testing.assert_allclose([s.logprob for s in after.scores], scored, atol=1e-4)
        assert after.scores != before.scores


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"use_dora": True}, "use_dora"), ({"bias": "all"}, "bias"), ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "peft_type"), ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ],
)  # fmt: skip
def test_more_than_a_lora_is_refused(qwen3: Made, tmp_path: Path, change: dict[str, Any], named: str) -> None:
    """Read as a plain LoRA it would give wrong answers without a word."""
    folder = shutil.copytree(qwen3.folders[0], tmp_path / "adapter")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ArtifactError) as error:
        read_lora(folder, load(qwen3.base))
    assert error.value.field == named


def test_an_adapter_of_another_base_is_refused(qwen3: Made, tmp_path: Path) -> None:
    other = {**BASES["qwen3"], "intermediate_size": 64}
    reference(other).save_pretrained(tmp_path / "base")
    adapted(tmp_path / "base", tmp_path / "adapter", 0, r=4, target_modules=["up_proj"])
    with pytest.raises(ArtifactError, match="another base"):
        read_lora(tmp_path / "adapter", load(qwen3.base))
    shutil.copy(qwen3.folders[0] / "adapter_config.json", tmp_path)
    with pytest.raises(ArtifactError, match="weights are missing"):
        read_lora(tmp_path, load(qwen3.base))


def test_alpha_patterns_are_honoured(qwen3: Made, tmp_path: Path) -> None:
    how: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "alpha_pattern": {"layers.1.self_attn.q_proj": 40},
        "rank_pattern": {"v_proj": 7},
    }
    theirs = adapted(qwen3.base, tmp_path / "pattern", 5, target_modules=["q_proj", "v_proj"], **how)
    model = load(qwen3.base)
    lora = read_lora(tmp_path / "pattern", model)
    new, logprobs = expected(theirs, prompts()[1], 8)
    got = Engine(model).generate([prompts()[1]], Sampling(8, temperature=0, logprobs=0), lora)[0]
    assert list(got.ids) == new
    np.testing.assert_allclose([s.logprob for s in got.scores], logprobs, atol=1e-4)


def test_runners_are_those_expected(qwen3: Made) -> None:
    with kernels.disabled():
        assert isinstance(qwen3.engine()[0].runner, CachedRunner)
