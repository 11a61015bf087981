"""What each kind of stage is expected to take, before it runs and without torch: one function a stage, found by its name.

Each raises `Unknown` where a stage that has not run decides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tutelage.artifacts import whole_of
from tutelage.config.stages import Adapt, Data, Distil, Evaluate, ExtendVocab, Rl, Sample, Tokens
from tutelage.config.tasks import SMALL_ENCODER, SMALL_T5, SOURCE_LENGTH, TARGET_LENGTH, TEXT_LENGTH, Classify, Translate
from tutelage.config.train import Loop, Train, Tune
from tutelage.data.tokens.encode import CHUNK_BYTES
from tutelage.errors import ConfigError
from tutelage.plan import stages as parts
from tutelage.plan.adapters import adapter_memory
from tutelage.plan.config_json import read_config_json
from tutelage.plan.machine import Machine, core_count, find_compiler, measure
from tutelage.plan.memory import Memory, frozen
from tutelage.plan.memory import estimate as training_memory
from tutelage.plan.parameters import Shape
from tutelage.plan.shape import Derived
from tutelage.plan.time import NOTHING, Span
from tutelage.preflight import data_sizes
from tutelage.preflight.data_sizes import RecordSize, records_of
from tutelage.recipe import Estimate, Planned, Unknown
from tutelage.setup.extend import ParentRun, parent_of
from tutelage.setup.hyperparameters import before, check_context, derive_all, micro_rows, new_tokens, passes, ranks_sharing
from tutelage.tokenizer.load import TokenizerFolder

NEW_WORDS = {"vocab_size": 4096, "max_position_embeddings": 512}  # of a small model from scratch, until its tokenizer is there
SOME_TOKENS = 10**8  # of data, where only what does not depend on them is asked for
CONTROL = {True: Span(4, 20), False: Span(1, 2)}  # tokens of a record beside its text: 8.7 in a conversation of two turns


def data(planned: Planned) -> Estimate:
    """Text out of its files, then cleaned, deduplicated and written."""
    config = planned.config
    assert isinstance(config, Data)
    found = [data_sizes.source(name, config) for name in (*config.sources, *config.validation_sources)]
    text, reading = (sum(spans, NOTHING) for spans in ((s.text for s in found), (s.seconds for s in found)))
    out = parts.START + parts.collect(text, config.kind, max(s.largest for s in found))
    return out + Estimate(reading, NOTHING, f"{reading.said('s')} to find it in its files", "") if reading.high else out


def tokenizer(planned: Planned) -> Estimate:
    """Learning from one part of the records, measured on the other."""
    found = records_of(planned, "data")
    return parts.START + parts.learn(found.train_bytes + found.held_out_bytes)


def tokens(planned: Planned) -> Estimate:
    """Encoding both parts."""
    assert isinstance(planned.config, Tokens)
    return parts.START + _encoding(records_of(planned, "data"), planned.config.workers)


def training(planned: Planned) -> Estimate:
    """The derivation at this machine's measured rate, for the least and the most data that there may be."""
    config = planned.config
    assert isinstance(config, Train)
    found = derived(planned, SOME_TOKENS)
    check_context(found, before(config))
    shape, row = found.architecture, int(found.values["sequence_length"])
    ends, making = _ends(planned, found)
    machine = measure()
    device = _device(config.device, machine)
    kernels = config.kernels and device == "cpu" and find_compiler() is not None
    rows, options = max(micro_rows(config, d) for d in ends), (config.dtype, config.checkpointing, kernels)
    need = training_memory(
        shape, rows, row, config.optimizer.name, *options, ranks=ranks_sharing(config), **adapter_memory(shape, config.adapter)
    )
    tokens = _tokens(planned, ends)
    out = parts.train(shape, tokens, row, machine.peak_flops(device, config.dtype), device, need)
    out = parts.START_TORCH + out
    return replace(out, seconds=out.seconds + making.seconds, because=f"{out.because} + {making.because}") if making else out


pretrain = sft = training


def distil(planned: Planned) -> Estimate:
    """The student's training, and the teacher's reading: of each step, or of the texts once."""
    config = planned.config
    assert isinstance(config, Distil)
    shape, machine = shape_of(planned, "teacher"), measure()
    device = _device(config.device, machine)
    try:
        if config.policy == "on":
            student, tokens = _answers(planned, config, config.rollouts.prompts)
            return student + _teacher(parts.read(shape, tokens, 0.0, machine.peak_flops(device, config.dtype), device))
        if config.top_k:
            tokens = corpus_tokens(records_of(planned, "data"), Shape.of(shape).vocab)
        else:
            tokens = _tokens(planned, _ends(planned, derived(planned, SOME_TOKENS))[0])
        return training(planned) + _teacher(parts.read(shape, tokens, 0.0, machine.peak_flops(device, config.dtype), device))
    except ConfigError as error:  # of a family that is not ours
        raise Unknown(f"not known: {error.message} ({error.field})") from None


def _teacher(reading: Estimate) -> Estimate:
    return replace(reading, room=f"{reading.room} of the teacher")


def _ends(planned: Planned, found: Derived) -> tuple[list[Derived], Estimate | None]:
    """The derivations for the least and the most data that there may be, and what making its tokens takes; only `found` where
    that does not count."""
    config = planned.config
    assert isinstance(config, Train)
    try:
        records = records_of(planned, "data")
        most = corpus_tokens(records, Shape.of(found.architecture).vocab)
        return [derived(planned, max(1, round(n))) for n in (most.low, most.high)], _encoding(records, 0)
    except Unknown:
        if config.steps == config.tokens == "derived":
            raise
        return [found], None


def data_range(planned: Planned, found: Derived) -> list[Derived]:
    """The derivations for the least and the most data. Raises `Unknown` where the data has still to be made."""
    records_of(planned, "data")
    return _ends(planned, found)[0]


def _tokens(planned: Planned, ends: list[Derived]) -> Span:
    """What all steps read."""
    parent = _parent(planned)
    done = parent.steps if parent else 0
    steps = sorted((int(d.values["steps"]) - done) * int(d.values["batch_tokens"]) for d in ends)
    return Span(steps[0], steps[-1])


def extend_vocab(planned: Planned) -> Estimate:
    """Learning tokens from the texts, and the steps that train their rows."""
    assert isinstance(planned.config, ExtendVocab)
    found = records_of(planned, "data")
    out = parts.learn(found.train_bytes + found.held_out_bytes)
    return training(planned) + out if planned.config.train else parts.START_TORCH + out


def adapt(planned: Planned) -> Estimate:
    """Training, with the rows of new tokens before it, and reading the held-out documents of each kind before and after."""
    config, out = planned.config, training(planned)
    assert isinstance(config, Adapt)
    shape, machine = derived(planned, SOME_TOKENS).architecture, measure()
    device = _device(config.device, machine)
    peak = machine.peak_flops(device)
    if config.general:
        out += replace(_encoding(records_of(planned, "general"), 0), memory_bytes=NOTHING, room="")
    if config.vocab_add:
        found = derived(planned, SOME_TOKENS)
        tokens = config.warm_steps * int(found.values["batch_tokens"])
        need = training_memory(shape, micro_rows(config, found), int(found.values["sequence_length"]), config.optimizer.name)
        warm = parts.train(shape, Span(tokens, tokens), int(found.values["sequence_length"]), peak, device, need)
        out += replace(warm + parts.learn(records_of(planned, "data").train_bytes), memory_bytes=NOTHING, room="")
    for key in ("data", "general") if config.general else ("data",):
        held = records_of(planned, key)
        part = min(1.0, config.max_documents / held.held_out.high) if config.max_documents and held.held_out.high else 1.0
        text = Span(held.held_out_bytes.low * part, held.held_out_bytes.high * part)
        read = (text / parts.bytes_per_token(Shape.of(shape).vocab) + held.held_out * part) * 2
        out += replace(parts.read(shape, read, 0.5, peak, device), memory_bytes=NOTHING, room="")
    return out


def tuning(planned: Planned) -> Estimate:
    """Passes over answers, forward and backward; the reference reads them once more."""
    config = planned.config
    assert isinstance(config, Tune)
    records, shape = records_of(planned, "data"), shape_of(planned)
    machine = measure()
    device = _device(config.device, machine)
    read = records.train_bytes / parts.bytes_per_token(Shape.of(shape).vocab) + records.train * 2 * CONTROL[True]
    if config.steps == "derived":
        seen = read * float(getattr(config, "epochs", 1.0))
    else:
        seen = read / records.train * (config.steps * config.batch)
    kernels = config.kernels and device == "cpu" and find_compiler() is not None
    length = int(shape.get("max_position_embeddings", 2048)) if config.max_length == "derived" else config.max_length
    options = (config.dtype, config.checkpointing, kernels)
    need = training_memory(
        shape, 1, config.micro_tokens, config.optimizer.name, *options, ranks=ranks_sharing(config),
        **adapter_memory(shape, config.adapter),
    )  # fmt: skip
    return parts.START_TORCH + parts.train(
        shape, seen * Span(1, 1.4), min(length, 2048), machine.peak_flops(device), device, need
    )


reward = preference = tuning


def rl(planned: Planned) -> Estimate:
    """Answers made one token after another, read again by references and values, and trained on."""
    config = planned.config
    assert isinstance(config, Rl)
    return _answers(planned, config, config.batch, config.updates, config.minibatches)[0]


def _answers(planned: Planned, config: Loop, batch: int, updates: int = 1, minibatches: int = 1) -> tuple[Estimate, Span]:
    """What training on a model's own answers takes, and how many tokens are read in it."""
    how: Any = getattr(config, "rollouts", config)
    records, shape = records_of(planned, "data"), shape_of(planned)
    machine = measure()
    device = _device(config.device, machine)
    asked = records.train_bytes / parts.bytes_per_token(Shape.of(shape).vocab) + records.train * CONTROL[True]
    per_prompt = Span(asked.low / max(1.0, records.train.high), asked.high / max(1.0, records.train.low))
    steps_each = updates * minibatches
    if config.steps == "derived":
        iterations = records.train * (float(getattr(config, "epochs", None) or 1.0) / batch)
    else:
        iterations = Span(config.steps / steps_each, config.steps / steps_each)
    answers = iterations * (batch * how.samples)
    made = answers * Span(how.max_tokens * 0.1, how.max_tokens)
    read = (made + iterations * batch * per_prompt) * updates
    kernels = config.kernels and device == "cpu" and find_compiler() is not None
    options = (config.dtype, config.checkpointing, kernels)
    step = batch / minibatches * (per_prompt.high + how.samples * how.max_tokens)
    tokens = min(how.micro_tokens, math.ceil(step))

    def trained(shape: Mapping[str, Any]) -> Memory:
        adapter = adapter_memory(shape, config.adapter)
        ranks = ranks_sharing(config)
        return training_memory(shape, 1, tokens, config.optimizer.name, *options, ranks=ranks, **adapter)

    need = trained(shape)
    if isinstance(config, Rl):
        if config.method == "ppo":
            need = need.with_model("value", trained(shape_of(planned, "value") if config.value else shape))
        need = need.with_terms({name: frozen(shape_of(planned, own)) for name, own in _asked_between(config).items()})
    rate = machine.peak_flops(device, config.dtype)
    out = parts.START_TORCH + parts.train(shape, read, how.max_tokens, rate, device, need)
    return out + parts.answer(shape, answers, how.max_tokens, rate, device), read


def _asked_between(config: Rl) -> dict[str, str]:
    """Models that are held beside those of a step, and the inputs that they are of."""
    reference = "reference" if config.reference else None if config.adapter.kind != "none" else "model"
    found = {"reference": reference if config.kl else None, "reward model": "reward_model" if config.reward_model else None}
    return {name: own for name, own in found.items() if own is not None}


def sample(planned: Planned) -> Estimate:
    """Answers made one token after another."""
    config = planned.config
    assert isinstance(config, Sample)
    machine, records = measure(), records_of(planned, "data")
    asked = records.train if config.part == "train" else records.held_out
    most = config.max_prompts or asked.high
    answers = Span(min(asked.low, most), min(asked.high, most)) * config.samples
    device = _device(config.device, machine)
    return parts.START_TORCH + parts.answer(shape_of(planned), answers, config.max_tokens, machine.peak_flops(device), device)


def select(planned: Planned) -> Estimate:
    """Reading answers and writing some of them."""
    return parts.START + parts.collect(records_of(planned, "answers").train_bytes, "conversations", 0)


def classify(planned: Planned) -> Estimate:
    """Passes over texts, once for the model and once more for each fold."""
    config = planned.config
    assert isinstance(config, Classify)
    start = next((n for n in ("encoder", "model") if getattr(config, n)), None)
    shape = shape_of(planned, start) if start else {**SMALL_ENCODER, **NEW_WORDS, **config.architecture}
    raw = {**shape, "architectures": ["ForClassification"], "id2label": {}}
    return _texts(planned, raw, TEXT_LENGTH, max(1, config.folds))  # each fold leaves one part out


def translate(planned: Planned) -> Estimate:
    """Passes over pairs; the held-out sources that are translated at the end are few."""
    config = planned.config
    assert isinstance(config, Translate)
    raw = shape_of(planned) if config.model else {"model_type": "t5", **SMALL_T5, **NEW_WORDS, **config.architecture}
    target = TARGET_LENGTH if config.max_target == "derived" else config.max_target
    return _texts(planned, raw, SOURCE_LENGTH + target, 1)


def _texts(planned: Planned, raw: Mapping[str, Any], most: int, times: int) -> Estimate:
    """Passes over texts of at most `most` tokens where the settings say nothing else."""
    config = planned.config
    assert isinstance(config, Classify | Translate)
    records = records_of(planned, "data")
    shape = Shape.of(raw)
    if config.max_length != "derived" and config.max_length > raw.get("max_position_embeddings", config.max_length):
        raise ConfigError(
            "longer than the model reads", field="max_length", found=config.max_length,
            expected=f"{raw['max_position_embeddings']} or less",
        )  # fmt: skip
    length = min(most if config.max_length == "derived" else config.max_length, shape.context)
    texts = records.train_bytes / parts.bytes_per_token(shape.vocab) + records.train * 3
    read = Span(min(texts.low, records.train.low * length), min(texts.high, records.train.high * length))
    least, all_texts = (max(1.0, n) for n in (records.train.low, records.train.high))
    if config.steps == "derived":  # the more texts, the more is read
        seen = Span(read.low * passes(config, least), read.high * passes(config, all_texts))
    else:
        seen = read * (config.steps * config.batch / least)
    machine = measure()
    device = _device(config.device, machine)
    need = training_memory(raw, 1, config.micro_tokens, config.optimizer.name, config.dtype, config.checkpointing, False)
    seen = seen * times * Span(1, 1.4)
    return parts.START_TORCH + parts.train(raw, seen, length, machine.peak_flops(device), device, need)


def evaluate(planned: Planned) -> Estimate:
    """Reading the held-out documents, the baselines, and answering the held-out questions."""
    config = planned.config
    assert isinstance(config, Evaluate)
    shape = shape_of(planned)
    machine = measure()
    device = _device(config.device, machine)
    peak, out = machine.peak_flops(device), parts.START_TORCH
    try:
        vocabulary = Shape.of(shape).vocab
        if config.documents:
            found = records_of(planned, "documents")
            part = min(1.0, config.max_documents / found.held_out.high) if config.max_documents else 1.0
            text = Span(found.held_out_bytes.low * part, found.held_out_bytes.high * part)
            read = text / parts.bytes_per_token(vocabulary) + found.held_out * part
            out += parts.read(shape, read, config.stride, peak, device) + parts.samples(shape)
            out = out + parts.baselines(found.train_bytes, text) if config.baselines else out
        if config.questions:
            asked = records_of(planned, "questions").held_out
            most = config.max_questions or asked.high
            asked = Span(min(asked.low, most), min(asked.high, most))
            out += parts.answer(shape, asked, config.max_tokens, peak, device)
    except ConfigError as error:  # of a family that is not ours: `transformers` runs it, and its shape has other names
        raise Unknown(f"not known: {error.message} ({error.field})") from None
    return out


def merge(planned: Planned) -> Estimate:
    """Reading a base, some tokens through it, and writing it again."""
    return parts.START_TORCH


def report(planned: Planned) -> Estimate:
    """A page, whose size hardly depends on its runs."""
    return parts.START + parts.REPORT


def derived(planned: Planned, corpus_tokens: int) -> Derived:
    """The derivation of a training stage whose inputs may still have to be made, on so many tokens of data."""
    config, waits = planned.config, planned.waits_for
    if not isinstance(config, Train):
        raise Unknown(f"known after {planned.name}")
    parent = _parent(planned)
    if "model" in planned.inputs and not new_tokens(config):
        start = planned.inputs["model"].path
        return derive_all(config, Shape.of(_config_json(start)).vocab, corpus_tokens, start, parent=parent)
    if "model" in planned.inputs or "model" in waits:
        here = "model" in planned.inputs
        before = _config_json(planned.inputs["model"].path) if here else shape_of(planned)
        before = {**before, "vocab_size": Shape.of(before).vocab + new_tokens(config)}
        return derive_all(config, Shape.of(before).vocab, corpus_tokens, None, before, parent=parent)
    if "tokenizer" in waits:
        return derive_all(config, int(getattr(waits["tokenizer"].config, "vocab_size", 4096)), corpus_tokens, None)
    words = TokenizerFolder.open(planned.inputs["tokenizer"].path)
    return derive_all(config, words.vocab_size, corpus_tokens, None, parent=parent)


def _parent(planned: Planned) -> ParentRun | None:
    """The run that a training stage extends. Raises `Unknown` where its inputs have still to be made."""
    assert isinstance(planned.config, Train)
    if planned.config.extends is not None and planned.run is None:
        raise Unknown(f"known after {next(iter(planned.waits_for.values())).name}")
    return None if planned.run is None else parent_of(planned.config, planned.run)


def shape_of(planned: Planned, name: str = "model") -> Mapping[str, Any]:
    """The config.json of a model that a stage reads, there or still to be made."""
    if name in planned.inputs:
        return _config_json(planned.inputs[name].path)
    maker = planned.waits_for[name]
    if isinstance(maker.config, Train):
        return derived(maker, SOME_TOKENS).architecture
    # What tunes a model leaves its shape as it was.
    before = next((key for key in ("model", "adapter") if key in {**maker.inputs, **maker.waits_for}), None)
    if before is None:
        raise Unknown(f"known after {maker.name}")
    return shape_of(maker, before)


def _config_json(model: Path) -> Mapping[str, Any]:
    return read_config_json(whole_of(model) / "config.json")


def corpus_tokens(records: RecordSize, vocabulary: int) -> Span:
    """Tokens of the training part."""
    return records.train_bytes / parts.bytes_per_token(vocabulary) + records.train * CONTROL[records.conversations]


def _encoding(records: RecordSize, workers: int) -> Estimate:
    few = records.lines.high <= 4 * CHUNK_BYTES  # data/tokens/shards.py: not worth the start of a process
    return parts.encode(records.lines, workers or (1 if few else core_count()))


def _device(asked: str, machine: Machine) -> str:
    return ("cuda" if machine.accelerators else "cpu") if asked == "auto" else asked
