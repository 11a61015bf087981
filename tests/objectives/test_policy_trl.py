"""Parity with TRL's trainers: one batch, one model, loss and gradient of every variant that TRL has."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.objectives.rollouts import LONGEST, SHAPE, VOCABULARY, policy, prompt_groups, replaced, without
from tutelage.data.groups.groups import Completion, PromptGroup
from tutelage.data.groups.source import count, group_batch
from tutelage.objectives import objective
from tutelage.rollout.correction import correction
from tutelage.train.step import StepConfig, gradients

pytestmark = pytest.mark.peers
trl = pytest.importorskip("trl", reason="parity with TRL: pip install trl==1.16 datasets")
import tokenizers  # noqa: E402
import transformers  # noqa: E402

PAD = 0


def twin() -> Any:
    """The model of `transformers` with our tiny model's weights."""
    shape = {
        **SHAPE,
        "rope_parameters": {"rope_type": "default", "rope_theta": SHAPE["rope_theta"]},
        "attn_implementation": "eager",
    }
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape, eos_token_id=1, pad_token_id=PAD, bos_token_id=None))
    model.model.embed_tokens.padding_idx = None  # else a token of that id gets no gradient where it is no padding
    model.load_state_dict({**policy().state_dict(), "lm_head.weight": policy().lm_head.weight}, strict=True)
    return model


def trainer(kind: str, folder: Any, beta: float = 0.0, **settings: Any) -> Any:
    from datasets import Dataset

    words = {f"<{i}>": i for i in range(VOCABULARY)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<0>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<0>", eos_token="<1>")
    config, cls = {"grpo": (trl.GRPOConfig, trl.GRPOTrainer), "rloo": (trl.RLOOConfig, trl.RLOOTrainer)}[kind]
    args = config(
        str(folder), per_device_train_batch_size=2, num_generations=2, max_completion_length=LONGEST, report_to=[], use_cpu=True,
        bf16=False, gradient_checkpointing=False, disable_dropout=True, beta=0.0, **settings,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": "<3>"}] * 4)
    found = cls(twin(), lambda completions, **_: [0.0] * len(completions), args, rows, processing_class=tokenizer)
    found.model.train()
    found.current_gradient_accumulation_steps = 1
    found.beta = beta  # given to its config, it would look for a reference model's folder
    return found


def inputs(made: list[PromptGroup]) -> dict[str, torch.Tensor]:
    """TRL's batch of the same answers: prompts padded at the left, answers at the right."""
    pairs = [(f.prompt, e) for f in made for e in f.endings]
    longest = max(len(p) for p, _ in pairs), max(len(e.ids) for _, e in pairs)

    def left(x: Any) -> Any:
        return np.concatenate([np.zeros(longest[0] - len(x)), x])

    def right(x: Any) -> Any:
        return np.concatenate([x, np.zeros(longest[1] - len(x))])

    def rows(values: Any, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(np.stack(list(values)), dtype=dtype)

    streams = {name: rows((right(e.tokens[name]) for _, e in pairs), torch.float32) for name in ("old", "reference", "advantage")}
    mask = rows(right(np.ones(len(e.ids)) if e.mask is None else e.mask) for _, e in pairs)
    return {
        "prompt_ids": rows(left(p) for p, _ in pairs), "prompt_mask": rows(left(np.ones(len(p))) for p, _ in pairs),
        "completion_ids": rows(right(e.ids) for _, e in pairs),
        "completion_mask": rows(right(np.ones(len(e.ids))) for _, e in pairs), "tool_mask": mask,
        "num_items_in_batch": mask.sum(), "old_per_token_logps": streams["old"], "old_logps": (streams["old"] * mask).sum(1),
        "ref_per_token_logps": streams["reference"], "advantages": streams["advantage"][:, 0],
    }  # fmt: skip


def ours(name: str, made: list[PromptGroup], **settings: Any) -> tuple[float, torch.Tensor, dict[str, float]]:
    model = policy()
    groups = [[f] for f in made]
    result = gradients(
        StepConfig({"policy": model}, objective(name, **settings)), group_batch(groups, count(made, "tree"), "tree")
    )
    names = sorted(n for n, _ in model.named_parameters())
    return result.loss, torch.cat([model.get_parameter(n).grad.flatten() for n in names]), result.terms


def theirs(kind: str, made: list[PromptGroup], folder: Any, **settings: Any) -> tuple[float, torch.Tensor, Any]:
    coach = trainer(kind, folder, **settings)
    loss = coach._compute_loss(coach.model, inputs(made))
    loss.backward()
    held = dict(coach.model.named_parameters())
    return loss.item(), torch.cat([held[n].grad.flatten() for n in sorted(n for n, _ in policy().named_parameters())]), coach


def same(a: tuple[float, torch.Tensor, Any], b: tuple[float, torch.Tensor, Any]) -> None:
    assert a[0] == pytest.approx(b[0], abs=1e-5)
    torch.testing.assert_close(a[1], b[1], atol=1e-5, rtol=1e-4)


CLIP = {"clip_low": 0.15, "clip_high": 0.25}
THEIR_CLIP = {"epsilon": 0.15, "epsilon_high": 0.25}
SAME = [
    ("grpo", "length", CLIP, {**THEIR_CLIP, "loss_type": "grpo"}),
    ("dr_grpo", "longest", CLIP, {**THEIR_CLIP, "loss_type": "dr_grpo"}),
    ("dapo", "token", CLIP, {**THEIR_CLIP, "loss_type": "dapo"}),
    ("dapo", "token", CLIP, {**THEIR_CLIP, "loss_type": "bnpo"}),
    ("gspo", "length", CLIP, {**THEIR_CLIP, "loss_type": "grpo", "importance_sampling_level": "sequence"}),
    ("cispo", "token", {"clip_high": 0.25}, {"epsilon_high": 1.25, "loss_type": "cispo"}),
    ("grpo", "length", {**CLIP, "delta": 1.4}, {**THEIR_CLIP, "loss_type": "grpo", "delta": 1.4}),
]


@pytest.mark.parametrize(("name", "normaliser", "settings", "their"), SAME, ids=lambda x: x if isinstance(x, str) else None)
@pytest.mark.parametrize(("beta", "importance"), [(0.0, True), (0.3, True), (0.3, False)])
def test_grpo_and_its_kin(name, normaliser, settings, their, beta, importance, tmp_path):
    """Loss and gradient, with a tool's words in half of the answers, off policy, with and without the penalty (k3)."""
    made = without(prompt_groups(normaliser), "correction")
    a = ours(name, made, kl_weight=beta, kl_importance=importance, **settings)
    b = theirs("grpo", made, tmp_path, beta=beta, use_bias_correction_kl=importance, **their)
    same(a, b)
    measured = b[2]._metrics["train"]
    assert a[2]["_entropy"] == pytest.approx(measured["entropy"][0], abs=1e-5)
    if name != "cispo" and "delta" not in settings and name != "gspo":
        assert a[2]["_clipped_low"] == pytest.approx(measured["clip_ratio/low_mean"][0])
        assert a[2]["_clipped_high"] == pytest.approx(measured["clip_ratio/high_mean"][0])
    if beta and not importance:  # they measure what they weigh
        assert a[2]["_kl"] == pytest.approx(measured["kl"][0], abs=1e-5)


def test_rloo(tmp_path):
    """The ratio of whole answers. TRL's RLOO knows no words of tools."""
    made = [PromptGroup(f.name, f.prompt, tuple(Completion(e.ids, None, e.tokens) for e in f.endings)) for f in prompt_groups()]
    made = replaced(without(made, "correction"), weight=lambda f, e: np.full(len(e.ids), 1 / len(e.ids)))
    a, b = ours("rloo", made, **CLIP), theirs("rloo", made, tmp_path, beta=0.0, **THEIR_CLIP)
    same(a, b)
    assert 0 < a[2]["_clipped_low"] < 1


def test_entropy_bonus(tmp_path):
    made = without(prompt_groups("token"), "correction")
    a = ours("dapo", made, entropy_weight=0.2, **CLIP)
    same(a, theirs("grpo", made, tmp_path, beta=0.0, loss_type="dapo", entropy_coef=0.2, **THEIR_CLIP))


@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_correction(mode, level, tmp_path):
    """Importance of what the engine sampled, as TRL has it for vLLM: on the surrogate, not on the penalty."""
    made = prompt_groups("token")
    bounds = {"floor": 0.7, "cap": 1.2} if level == "token" else {"floor": 0.1, "cap": 3.0}

    def importance(f: PromptGroup, e: Completion) -> Any:
        mask = np.ones(len(e.ids), bool) if e.mask is None else e.mask.astype(bool)
        out = np.ones(len(e.ids))
        out[mask] = correction(e.tokens["old"][mask], e.tokens["value_old"][mask] - 4.1, mode=mode, level=level, **bounds)
        return out

    made = replaced(made, correction=importance)
    batch = inputs(made)
    engine = inputs(replaced(made, old=lambda f, e: e.tokens["value_old"] - 4.1))["old_per_token_logps"]
    d = (batch["old_per_token_logps"] - engine) * batch["tool_mask"]
    d = d.sum(1, keepdim=True) if level == "sequence" else d
    coach = trainer("grpo", tmp_path, beta=0.3, loss_type="dapo", **THEIR_CLIP)
    coach.use_vllm, coach.vllm_importance_sampling_correction = True, True
    r = d.exp()
    outside = (r < bounds["floor"]) | (r > bounds["cap"])
    batch["importance_sampling_ratio"] = (
        r.clamp(bounds["floor"], bounds["cap"]) if mode == "truncate" else r.masked_fill(outside, 0)
    )
    loss = coach._compute_loss(coach.model, batch)
    assert outside.any() and not outside.all()
    assert ours("dapo", made, kl_weight=0.3, **CLIP)[0] == pytest.approx(loss.item(), abs=1e-5)
