"""Parity with TRL: its trainers' own loss code on the same model, reference and tokens gives our losses and our gradients.

Needs `trl` (tried with 1.16) and `transformers`. A tiny Qwen3 is made by `transformers` and loaded by both from one folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.objectives import small
from tutelage.data.groups.groups import Completion, PromptGroup
from tutelage.models.decoder import Decoder
from tutelage.models.open import load
from tutelage.objectives import objective
from tutelage.train.step import StepConfig, gradients

pytestmark = pytest.mark.peers
PAD = small.VOCABULARY  # in no family: `transformers` gives the embedding of a padding token no gradient
WORDS = [f"w{i:02}" for i in range(PAD + 1)]
LOSSES: dict[str, tuple[str, dict[str, Any]]] = {  # ours -> TRL's name, and settings that have other names or defaults there
    "dpo": ("sigmoid", {}), "cdpo": ("sigmoid", {"cpo_alpha": 0.0, "label_smoothing": 0.2}), "robust": ("robust", {}),
    "dpo_norm": ("sigmoid_norm", {}), "ipo": ("ipo", {}), "hinge": ("hinge", {}), "exo_pair": ("exo_pair", {}),
    "discopop": ("discopop", {}), "nca_pair": ("nca_pair", {}), "sppo_hard": ("sppo_hard", {}), "apo_zero": ("apo_zero", {}),
    "apo_down": ("apo_down", {}), "orpo": ("orpo", {}), "simpo": ("simpo", {"cpo_alpha": 0.0}),
    "cpo": ("sigmoid", {"cpo_alpha": 0.5}), "cpo_simpo": ("simpo", {"cpo_alpha": 1.0}),
}  # fmt: skip


@pytest.fixture(scope="module")
def trl() -> Any:
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    return pytest.importorskip("trl", reason="trl is not installed here")


@pytest.fixture(scope="module")
def folders(trl: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Model folders of a policy and of a reference, with a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="w02"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w01", pad_token=WORDS[PAD], unk_token="w02")
    shape = {k: v for k, v in small.SHAPE.items() if k not in ("model_type", "vocab_size")}
    out = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(Qwen3Config(**shape, vocab_size=len(WORDS), eos_token_id=1, pad_token_id=PAD))
        out.append(tmp_path_factory.mktemp(f"model{seed}"))
        model.save_pretrained(out[-1])
        tokenizer.save_pretrained(out[-1])
    return out


def theirs(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def ours(folder: Path) -> Decoder:
    model = load(folder)
    assert isinstance(model, Decoder)
    return model


def referred(made: list[PromptGroup], folder: Path) -> list[PromptGroup]:
    """The prompt groups with a reference model's log-probabilities."""
    model = ours(folder)

    def completion(group: PromptGroup, k: int) -> Completion:
        old = group.completions[k]
        return Completion(
            old.ids, old.mask, per_completion={**old.per_completion, "reference": float(small.logprobs(model, group, k).sum())}
        )

    return [PromptGroup(f.name, f.prompt, (completion(f, 0), completion(f, 1))) for f in made]


def padded(rows: list[list[int]], fill: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True, padding_value=fill)


def texts(made: list[PromptGroup], number: int) -> tuple[list[list[int]], list[list[int]]]:
    """Ids of each text, and which of its tokens are supervised."""
    ids = [f.prompt.tolist() + f.completions[number].ids.tolist() for f in made]
    masks = []
    for f in made:
        completion = f.completions[number]
        own = [1] * len(completion.ids) if completion.mask is None else completion.mask.tolist()
        masks.append([0] * len(f.prompt) + own)
    return ids, masks


def dpo_batch(made: list[PromptGroup]) -> dict[str, torch.Tensor]:
    ids, masks = (a + b for a, b in zip(texts(made, 0), texts(made, 1), strict=True))
    inputs = {"input_ids": padded(ids, PAD), "attention_mask": padded([[1] * len(r) for r in ids], 0)}
    return {**inputs, "completion_mask": padded(masks, 0)}


def pair_batch(made: list[PromptGroup]) -> dict[str, torch.Tensor]:
    """What the trainers of ORPO and CPO read."""
    out = {}
    for number, side in enumerate(("chosen", "rejected")):
        ids, masks = texts(made, number)
        labels = [[i if m else -100 for i, m in zip(row, mask, strict=True)] for row, mask in zip(ids, masks, strict=True)]
        out |= {
            f"{side}_input_ids": padded(ids, PAD),
            f"{side}_attention_mask": padded([[1] * len(r) for r in ids], 0),
            f"{side}_labels": padded(labels, -100),
        }
    return out


def their_pair_loss(
    trl: Any, method: str, settings: dict[str, Any], made: list[PromptGroup], folders: list[Path], tmp: Path
) -> Any:
    """TRL's loss and its model with gradients."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    name, changes = LOSSES[method]
    common = {
        "output_dir": str(tmp), "report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "max_length": 64, "beta": settings.get("beta", 0.1), **changes,
    }  # fmt: skip
    rows = Dataset.from_list([{"prompt": "w03 w04", "chosen": " w05", "rejected": " w06"}] * 2)
    rest = {"train_dataset": rows, "processing_class": AutoTokenizer.from_pretrained(folders[0])}
    model = theirs(folders[0])
    if method == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        trainer = ORPOTrainer(model, args=ORPOConfig(**common), **rest)
        loss, _ = trainer.get_batch_loss_metrics(model, pair_batch(made))
    elif method in ("cpo", "simpo", "cpo_simpo", "cdpo"):
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        gamma = {"simpo_gamma": settings["gamma"]} if "gamma" in settings else {}
        trainer = CPOTrainer(model, args=CPOConfig(**common, loss_type=name, **gamma), **rest)
        loss, _ = trainer.get_batch_loss_metrics(model, pair_batch(made))
    else:
        smoothing, tau = settings.get("label_smoothing", 0.0), settings.get("tau", 0.05)
        args = trl.DPOConfig(**common, loss_type=[name], label_smoothing=smoothing, discopop_tau=tau)
        trainer = trl.DPOTrainer(model, ref_model=theirs(folders[1]), args=args, **rest)
        loss = trainer._compute_loss(model, dpo_batch(made), False)
    loss.backward()
    return loss.item(), model


def compare(
    method: str, settings: dict[str, Any], made: list[PromptGroup], loss: float, peer: torch.nn.Module, folder: Path
) -> None:
    policy = ours(folder)
    found = gradients(
        StepConfig({"policy": policy}, objective(method, **settings)), small.source(method, made, layout="tree").next(0)
    )
    assert found.loss == pytest.approx(loss, abs=1e-5, rel=1e-5)
    wanted = {name: p.grad for name, p in peer.named_parameters()}
    largest = max(float(g.abs().max()) for g in wanted.values() if g is not None)
    seen = 0
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-5 * max(largest, 1.0), rtol=1e-3, msg=name)
        seen += 1
    assert seen == len(wanted) > 10


@pytest.mark.parametrize("method", small.PREFERENCES)
def test_pairs(trl, folders, tmp_path, method):
    """Guards against a loss of the same name that is another one. Texts differ in length; some tokens are not supervised, but
    for ORPO, where TRL learns all of the chosen text. TRL 1.16 smooths labels in its CPO alone: cDPO whose reference is 0."""
    settings = small.METHODS[method]
    made = small.pairs()
    if method == "orpo":
        made = [
            PromptGroup(f.name, f.prompt, tuple(Completion(e.ids, per_completion=e.per_completion) for e in f.completions))
            for f in made
        ]
    if method == "cdpo":
        made = [
            PromptGroup(
                f.name, f.prompt, tuple(Completion(e.ids, e.mask, per_completion={"reference": 0.0}) for e in f.completions)
            )
            for f in made
        ]
    else:
        made = referred(made, folders[1])
    loss, peer = their_pair_loss(trl, method, settings, made, folders, tmp_path)
    compare(method, settings, made, loss, peer, folders[0])


def test_kto(trl, folders, tmp_path):
    """Guards against another reference point: TRL's mismatched answers within one batch are those of our rotation."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    reference, policy = folders  # this way round the reference point is above 0
    settings = small.METHODS["kto"]
    made = small.rated()

    def words(ids: np.ndarray) -> str:
        return " ".join(WORDS[i] for i in ids)

    rows = [
        {
            "prompt": words(f.prompt) + " ", "completion": words(f.completions[0].ids),
            "label": bool(f.completions[0].per_completion["desirable"]),
        }
        for f in made
    ]  # fmt: skip
    args = trl.KTOConfig(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=64,
        per_device_train_batch_size=len(rows), beta=settings["beta"], desirable_weight=settings["desirable_weight"],
        undesirable_weight=settings["undesirable_weight"],
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    model = theirs(policy)
    trainer = trl.KTOTrainer(
        model, ref_model=theirs(reference), args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    ready = [{k: row[k] for k in ("prompt_ids", "completion_ids", "KL_completion_ids", "label")} for row in trainer.train_dataset]
    # an end token was put behind each answer: ours have it too
    made = referred(list(_as_theirs(made, ready)), reference)
    loss = trainer._compute_loss(model, trainer.data_collator(ready), False)
    loss.backward()
    assert trainer._metrics["eval"]["kl"][-1] > 0.05
    compare("kto", settings, made, loss.item(), model, policy)


def _as_theirs(made: list[PromptGroup], rows: list[dict[str, Any]]) -> Iterator[PromptGroup]:
    for group, row in zip(made, rows, strict=True):
        assert group.prompt.tolist() == row["prompt_ids"]
        whole = group.completions[0].per_completion
        completions = (
            Completion(np.array(row["completion_ids"]), per_completion=whole),
            Completion(np.array(row["KL_completion_ids"]), per_completion=whole),
        )
        yield PromptGroup(group.name, group.prompt, completions)
