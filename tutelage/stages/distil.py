"""Stage `distil`: a student, a teacher with the same vocabulary, and texts -> a student that predicts what the teacher does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tutelage import log
from tutelage.config.stages import Distil
from tutelage.data.tokens.loader import StaticSource
from tutelage.data.tokens.shards import Segments
from tutelage.data.tokens.teacher_tokens import KeptTokens, TaughtSource, keep, likeliest, with_streams
from tutelage.errors import ConfigError, Setting
from tutelage.models.adapters.virtual_tokens import max_text_tokens
from tutelage.models.open import load
from tutelage.objectives import Objective, objective
from tutelage.objectives.distil import check_vocabularies
from tutelage.plan.flops import count_flops, train_flops_per_token
from tutelage.rundir import RunDir
from tutelage.setup import extend, hyperparameters, on_policy, text_rows, trainer
from tutelage.setup.trainer import TrainingSpec
from tutelage.tokenizer.load import TokenizerFolder
from tutelage.train import distributed

METHODS = {"forward": "forward_kl", "reverse": "reverse_kl", "jsd": "jsd"}


def run(config: Distil, run: RunDir) -> dict[str, Any]:
    device = trainer.choose_device(config)
    tokenizer = run.input("model")
    model = trainer.load_start(tokenizer, config, device, run.seed)
    teacher = load_teacher(run.input("teacher"), tokenizer, model, config, device)
    if config.policy == "on":
        work = on_policy.work_on_answers(config, run, model, teacher, method(config))
        return trainer.run_training(config, run, work, device)
    parent = extend.parent_of(config, run)
    segments = text_rows.open_segments(config, run, tokenizer, model.config.vocab_size)
    numbers, _ = hyperparameters.derive_numbers(config, model.config.vocab_size, segments[0], tokenizer, parent)
    work = text_rows.next_token_spec(config, run, model, segments, tokenizer, numbers, parent)
    work = replace(work, objective=method(config), per_byte=0.0)
    work = taught(work, config, run, teacher, segments, device) if config.top_k else beside(work, teacher)
    return trainer.run_training(config, run, work, device, parent)


def method(config: Distil) -> Objective:
    return objective(
        METHODS[config.loss],
        beta=config.beta,
        temperature=config.temperature,
        cross_entropy=config.cross_entropy,
        rest=config.rest,
    )


def load_teacher(folder: Path, tokenizer: Path, model: Any, config: Distil, device: torch.device) -> Any:
    """The frozen teacher. Raises `ConfigError` for another vocabulary and for a top_k of all of it, `ArtifactError` for other
    tokens."""
    teacher: Any = load(folder, device=device)
    check_vocabularies(model.config.vocab_size, teacher.config.vocab_size)
    TokenizerFolder.open(tokenizer).check_same(TokenizerFolder.open(folder))
    if config.top_k >= teacher.config.vocab_size:
        raise ConfigError("that is the whole vocabulary", field="top_k", found=config.top_k,
                          expected=f"fewer than {teacher.config.vocab_size}", fix=f"use {Setting('top_k', '0')}")  # fmt: skip
    size, own = (sum(p.numel() for p in m.parameters()) for m in (teacher, model))
    log.say(f"a teacher of {size / 1e6:,.2f}M parameters for a student of {own / 1e6:,.2f}M")
    return teacher.requires_grad_(False).eval()


def beside(work: TrainingSpec, teacher: Any) -> TrainingSpec:
    """The teacher as a frozen part, run in each step."""
    each = count_flops(teacher.config.to_hf(), work.length).forward
    share = each / train_flops_per_token(work.shape, work.length)
    return replace(work, parts={**work.parts, "teacher": teacher}, forward_share=share)


def taught(
    work: TrainingSpec, config: Distil, run: RunDir, teacher: Any, segments: tuple[Segments, Segments], device: torch.device
) -> TrainingSpec:
    """The teacher's likeliest tokens as streams: in files for what is trained on, in memory for what is held out."""
    source = work.source
    assert isinstance(source, StaticSource)
    top = likeliest(teacher, config.top_k, config.temperature, device)
    plan = {
        "texts": segments[0].digest, "teacher": run.inputs["teacher"].digest, "top_k": config.top_k,
        "temperature": config.temperature,
    }  # fmt: skip
    store = KeptTokens(run.folder("teacher"), segments[0])
    row = min(max_text_tokens(teacher), max(2048, work.length))
    made = keep(store, top, config.top_k, plan, row_length=row, rank=log.rank(), world=distributed.world())
    log.say(f"the teacher's {config.top_k} likeliest tokens at {segments[0].totals['supervised']:,} places: "
            f"{'made' if made else 'found'} in {store.folder}")  # fmt: skip
    if work.validation is not None:
        batches, counts = work.validation
        work = replace(work, validation=([with_streams(batch, *top(batch)) for batch in batches], counts))
    return replace(work, source=TaughtSource(source, store, plan))
