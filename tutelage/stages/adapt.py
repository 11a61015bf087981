"""Stage `adapt`: a checkpoint and the texts of a field -> the checkpoint adapted, with what it gained there and lost elsewhere.

Rows of general text between those of the field hold back forgetting (replay; Ibrahim et al. 2024, arXiv:2403.08763). New tokens
come from a `vocabulary` stage that runs first.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from tutelage import log
from tutelage.config.stages import Adapt, Vocabulary
from tutelage.data.tokens.loader import MixSource
from tutelage.data.tokens.shards import Segments
from tutelage.evaluate import adaptation_effect
from tutelage.evaluate.bits import DocumentSums
from tutelage.files import read_json, write_json
from tutelage.models.open import load
from tutelage.preflight.checks import WITHOUT
from tutelage.records import Document
from tutelage.rundir import RunDir
from tutelage.setup import extend, hyperparameters, text_rows, trainer
from tutelage.setup.text_rows import Hyperparameters
from tutelage.tokenizer.load import TokenizerFolder
from tutelage.train.hooks import Validate
from tutelage.train.loop import Hook

OWN = ("model", "data", "steps", "tokens", "epochs", "schedule", "patience", "extends", "adapter")  # not the vocabulary's


def run(config: Adapt, run: RunDir) -> dict[str, Any]:
    texts = held_out(config, run)
    parent = extend.parent_of(config, run)
    device = trainer.choose_device(config)
    before = measured(run, "before", run.input("model"), texts, device)
    start, tokenizer, out = with_tokens(config, run)
    size = TokenizerFolder.open(tokenizer).vocab_size
    field = text_rows.open_segments(config, run, tokenizer, size)
    general = text_rows.open_segments(config, run, tokenizer, size, "general") if config.general else None
    numbers, _ = hyperparameters.derive_numbers(config, size, field[0], start, parent)
    model: Any = trainer.load_start(start, config, device, run.seed)
    source = mixed(config, run, field[0], general[0], numbers) if general and config.replay_share else None
    beside = forgetting(config, general[1], numbers) if general else {}
    out |= text_rows.train_model(config, run, model, field, tokenizer, numbers, device, parent, source, beside)
    if source is not None:
        out["replayed"] = drawn(source, out["steps"])
    if log.rank() == 0:
        out |= report(before, measured(run, "after", trainer.result_of(config, run), texts, device), run.seed)
    return out


def held_out(config: Adapt, run: RunDir) -> dict[str, list[Document]]:
    """The documents that are measured before and after, by kind. Warns where there is nothing to measure forgetting with."""
    kinds = {"field": "data", "general": "general"} if config.general else {"field": "data"}
    if config.general is None:
        log.say(
            "warning: no general text (`general`): nothing is replayed, so the model forgets what these texts do not use, and "
            "how much it forgets is not measured, as the held-out part of general text would do",
            style="yellow",
        )
    return {kind: adaptation_effect.held_out(run.input(key), config.max_documents, f"`{key}`") for kind, key in kinds.items()}


def measured(
    run: RunDir, name: str, model: Path, texts: dict[str, list[Document]], device: torch.device
) -> dict[str, DocumentSums]:
    """What the model of a folder pays for each document, kept in the run: a resumed run does not measure again."""
    file = run.folder(f"{name}.json")
    if not file.exists():
        log.say(f"measuring {sum(map(len, texts.values())):,} held-out documents {name} training")
        words, loaded = TokenizerFolder.open(model), load(model, device=device)
        found = {kind: adaptation_effect.measure(loaded, words, documents, str(device)) for kind, documents in texts.items()}
        if log.rank() != 0:
            return found
        write_json(file, {kind: sums.to_json() for kind, sums in found.items()})
    return {kind: adaptation_effect.to_sums(rows) for kind, rows in read_json(file).items()}


def with_tokens(config: Adapt, run: RunDir) -> tuple[Path, Path, dict[str, Any]]:
    """The model to start from and its tokenizer, with new tokens if there are to be any, and what to say of them."""
    if not config.vocab_add:
        return run.input("model"), run.input("model"), {}
    assert run.nested is not None
    shared = {k: v for k, v in config.model_dump().items() if k in Vocabulary.model_fields and k not in OWN}
    shared = {**shared, "steps": config.warm_steps} if config.warm_steps else {k: shared[k] for k in WITHOUT if k in shared}
    made = run.nested(
        "vocabulary",
        {**shared, "model": str(run.input("model")), "data": str(run.input("data")), "add": config.vocab_add,
         "train": config.warm_steps > 0},
    )  # fmt: skip
    keys = ("tokens_added", "bytes_per_token_before", "bytes_per_token")
    return made.folder("model"), made.folder("words"), {**{k: made.facts[k] for k in keys}, "vocabulary": made.path.name}


def mixed(config: Adapt, run: RunDir, field: Segments, general: Segments, numbers: Hyperparameters) -> MixSource:
    """Rows of the field with the share of general ones between them."""
    sources = {name: text_rows.make_source(config, run, part, numbers) for name, part in (("field", field), ("general", general))}
    shares = {"field": 1 - config.replay_share, "general": config.replay_share}
    mix = MixSource({name: (source, shares[name]) for name, source in sources.items()}, seed=run.seed)
    log.say(mix.describe()[0])
    rows = drawn(mix, numbers.steps)
    for name, row in rows.items():
        log.say(f"  {name}: {row['rows']:,} rows, {row['epochs']:.2f} epochs")
    if not rows["general"]["rows"]:
        log.say(
            f"warning: so few rows are read that a replay_share of {config.replay_share:g} comes to none: nothing holds back "
            "forgetting; train longer, or raise it", style="yellow",
        )  # fmt: skip
    return mix


def drawn(mix: MixSource, steps: int) -> dict[str, dict[str, float]]:
    """Rows of each source in so many steps, and how often they were seen."""
    each = {name: stream.order.rows_per_epoch for name, stream in zip(mix.names, mix.streams, strict=True)}
    return {name: {"rows": rows, "epochs": round(rows / each[name], 4)} for name, rows in mix.drawn(steps).items()}


def forgetting(config: Adapt, general: Segments, numbers: Hyperparameters) -> dict[str, Hook]:
    """The loss on held-out general text, measured as often as that of the field."""
    batches = text_rows.validation(config, general, numbers)
    assert batches is not None, "`held_out` has refused general text without a held-out part"
    every = config.evaluate_every or max(1, math.ceil(numbers.steps / 10))
    return {"general": Validate(*batches, every, text_rows.tokens_per_byte(general), of="general")}


def report(before: dict[str, DocumentSums], after: dict[str, DocumentSums], seed: int) -> dict[str, Any]:
    """Gain and loss as facts, printed."""
    rows = {kind: adaptation_effect.change(before[kind], after[kind], seed) for kind in after}
    log.console.print(adaptation_effect.table(rows))
    verdict = "; ".join(adaptation_effect.verdict(kind, found) for kind, found in rows.items())
    log.say(verdict)
    return {"change": rows, "verdict": verdict, "bits_per_byte": rows["field"]["after"]["value"]}
