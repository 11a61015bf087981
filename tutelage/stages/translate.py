"""Stage `translate`: pairs of texts -> an encoder-decoder that makes the second of the first.

Separate from `sft`, none of whose parts apply here: rows of packed text, templates, one length for both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tutelage import log
from tutelage.config.tasks import SMALL_T5, SOURCE_LENGTH, TARGET_LENGTH, Translate
from tutelage.data.groups import dropped
from tutelage.data.groups.source import GroupSource
from tutelage.data.groups.translations import Marks, PairedTexts, PairEncoder, pair_of
from tutelage.engine import Engine, Sampling
from tutelage.errors import ArtifactError, ConfigError, Setting
from tutelage.evaluate.intervals import mean, wilson
from tutelage.evaluate.texts import similarity
from tutelage.files import whole_file, whole_folder, write_json
from tutelage.models.adapters.virtual_tokens import max_source_target_tokens
from tutelage.models.hf.seq2seq import Seq2Seq, new_seq2seq
from tutelage.objectives import objective
from tutelage.records import Conversation, read_records
from tutelage.rundir import RunDir
from tutelage.setup import answers, classifier, hyperparameters
from tutelage.setup.trainer import TrainingSpec, choose_device, load_start, run_training, write_model
from tutelage.tokenizer.load import TokenizerFolder
from tutelage.train import distributed
from tutelage.train.optim import LearningRates

TUNE_RATE, TUNE_AT = 1e-4, 220e6  # for T5 base; smaller models take more, by the square root
NEW_RATE = 2e-3  # of a small T5 from scratch
SHOWN = 5  # translations printed


def run(config: Translate, run: RunDir) -> dict[str, Any]:
    train, held = (list(read_records(run.input("data") / f"{part}.jsonl", Conversation)) for part in ("train", "validation"))
    device = choose_device(config)
    model, tokenizer = start_of(config, run, device)
    words = TokenizerFolder.open(tokenizer)
    length, most = lengths(config, model, words)
    encode = PairEncoder(words, Marks(model.start, model.ends or words.stop_ids))
    prompt_groups = PairedTexts(train, encode, length, most, cut=config.too_long == "right")
    say_report(prompt_groups)
    per_step = min(config.batch, len(prompt_groups))
    source = GroupSource(
        prompt_groups,
        per_step=per_step,
        micro_tokens=config.micro_tokens,
        layout="pairs",
        seed=config.seed,
        rank=log.rank(),
        world=distributed.world(),
    )
    log.say("\n".join(source.describe()))
    kept = answers.held_out(lambda: PairedTexts(held, encode, length, most, cut=config.too_long == "right")) if held else None
    epochs = hyperparameters.passes(config, len(prompt_groups))
    steps = math.ceil(epochs * len(prompt_groups) / source.per_step) if config.steps == "derived" else config.steps
    if config.steps == config.epochs == "derived":
        log.say(f"{steps:,} steps: {epochs:.3g} passes over {len(prompt_groups):,} pairs")
    tokens = float(prompt_groups.sizes("pairs").mean())
    rates = rates_of(config, model)
    checked = None if kept is None else GroupSource(kept, per_step=1, micro_tokens=config.micro_tokens, layout="pairs", seed=0)
    torch.manual_seed(config.seed)  # of dropout
    work = TrainingSpec(
        parts={"policy": model}, source=source, objective=objective("next_token"), steps=max(1, steps), rates=rates,
        shape=classifier.shape(model, model.config.vocab_size), length=round(tokens), micro=(1, config.micro_tokens),
        tokens=tokens * source.per_step * steps,
        numbers={"max_length": length, "max_target": most, "lr": rates.lr, "batch": source.per_step},
        write=lambda: write_model(model, run, tokenizer), validation=None if checked is None else checked.validation(),
    )  # fmt: skip
    facts = run_training(config, run, work, device) | {"pairs": len(prompt_groups), "left_out": dict(prompt_groups.report)}
    if kept is None or log.rank() != 0:
        return facts
    return facts | compare(model, words, kept, config.max_questions or len(kept), most, run.folder("scores"))


def start_of(config: Translate, run: RunDir, device: torch.device) -> tuple[Seq2Seq, Path]:
    """The model, with its adapter, and its tokenizer's folder. Raises `ArtifactError` for a model that is no encoder-decoder."""
    torch.manual_seed(config.seed)
    if config.model is None:
        folder = classifier.marked(run, begins=False)
        words = TokenizerFolder.open(folder)
        assert words.eos_id is not None  # or it could not have been marked
        pad = words.eos_id if words.pad_id is None else words.pad_id
        ids = {"pad_token_id": pad, "eos_token_id": words.eos_id, "decoder_start_token_id": pad}
        return new_seq2seq(config.architecture, {**SMALL_T5, "vocab_size": words.vocab_size, **ids}), folder
    found = load_start(run.input("model"), config, device, config.seed)
    if not isinstance(found, Seq2Seq):
        raise ArtifactError("not an encoder-decoder", file=run.input("model"), found=found.config.model_type,
                            expected="t5, bart, marian, …", fix="train a decoder with `tutelage sft`")  # fmt: skip
    return found, run.input("model")


def lengths(config: Translate, model: Seq2Seq, words: TokenizerFolder) -> tuple[int, int]:
    """Tokens that a source and a target may have: T5's positions have no end, other models' do. Raises `ConfigError` for more
    than the model has room for."""
    found = []
    for name, own, usual in zip(
        ("max_length", "max_target"), max_source_target_tokens(model), (SOURCE_LENGTH, TARGET_LENGTH), strict=True
    ):
        asked = getattr(config, name)
        if asked == "derived":
            told = words.max_length or own if name == "max_length" else own
            found.append(min(usual, own, told))
            if found[-1] < usual:
                log.say(f"{name}: {found[-1]}, as many tokens as the model has room for")
            continue
        if asked > own:
            virtual = model.config.max_position_embeddings - own
            raise ConfigError(
                "longer than the model's context", field=name, found=asked,
                expected=f"at most {own}{f', behind {virtual} virtual tokens' if virtual else ''}",
                fix=f"lower {name}, or leave it out",
            )  # fmt: skip
        found.append(asked)
    return found[0], found[1]


def rates_of(config: Translate, model: torch.nn.Module) -> LearningRates:
    if config.model is None:
        return classifier.rates(config, NEW_RATE, "a small model from scratch")
    return classifier.rates(config, *classifier.scaled(config.adapter.kind, model, TUNE_RATE, TUNE_AT))


def say_report(prompt_groups: PairedTexts) -> None:
    fix = f"raise max_length or max_target, set {Setting('too_long', 'right')}, or give shorter texts"
    dropped.say_left_out(prompt_groups.report, fix=fix)


def compare(
    model: Seq2Seq, words: TokenizerFolder, kept: PairedTexts, most: int, max_target: int, folder: Path
) -> dict[str, Any]:
    """Translates held-out sources greedily, writes what came out, and says how much of it is right. `max_target` counts what the
    model begins a target with, too."""
    asked: Sequence[Conversation] = kept.records[:most]
    prompts = [group.prompt.tolist() for group in kept.prompt_groups[:most]]
    engine = Engine(model.eval(), None, slots=16, max_length=max(max_target, *map(len, prompts)))
    done = engine.generate(prompts, Sampling(max_tokens=max_target - len(model.start), temperature=0.0, stop_ids=words.stop_ids))
    rows: list[dict[str, Any]] = []
    for record, found in zip(asked, done, strict=True):
        source, target = (text.strip() for text in pair_of(record))
        said = words.decode(found.ids, skip_special=True).strip()
        rows.append({"id": record.id, "source": source, "target": target, "said": said, "right": said == target,
                     "similarity": round(similarity(said, target), 4)})  # fmt: skip
    right = wilson(sum(row["right"] for row in rows), len(rows))
    alike = mean([row["similarity"] for row in rows], bounds=(0.0, 1.0))
    copied = mean([similarity(row["source"], row["target"]) for row in rows], bounds=(0.0, 1.0))
    with whole_folder(folder) as out:
        with whole_file(out / "held_out.jsonl") as f:
            f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        facts = {"right": right.to_json(), "similarity": alike.to_json(), "similarity_of_the_source": copied.to_json()}
        write_json(out / "scores.json", facts)
    for row in rows[:SHOWN]:
        wrong = "" if row["right"] else f" (expected {row['target'][:60]!r})"
        log.say(f"  {row['source'][:60]!r} -> {row['said'][:60]!r}{wrong}")
    log.say(
        f"{right.value:.1%} of {len(rows)} held-out targets to the letter ({right.low:.1%} to {right.high:.1%}); "
        f"characters alike {alike.value:.3f}, of the source itself {copied.value:.3f}"
    )
    return {"right": right.value, "similarity": alike.value}
