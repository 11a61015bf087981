"""Stage `extend_vocab`: a checkpoint and documents -> the checkpoint with new tokens, whose rows alone were trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tutelage import log
from tutelage.config.stages import ExtendVocab
from tutelage.models.export import save as save_model
from tutelage.models.extend import extend as extend_model
from tutelage.models.extend import tables
from tutelage.models.open import load
from tutelage.rundir import RunDir
from tutelage.setup import extend, hyperparameters, text_rows, trainer
from tutelage.stages.tokenizer import texts
from tutelage.tokenizer.extend import extend as extend_tokenizer
from tutelage.tokenizer.load import TokenizerFolder
from tutelage.tokenizer.measure import measure
from tutelage.train.rows import OnlyRows


def run(config: ExtendVocab, run: RunDir) -> dict[str, Any]:
    parent = extend.parent_of(config, run)
    device = trainer.choose_device(config)
    old, begun = TokenizerFolder.open(run.input("model")), run.folder("begun" if config.train else "model")
    if not begun.exists():
        begin(config, run, begun)
    new = TokenizerFolder.open(begun)
    out = compare(old, new, run.input("data"))
    if not config.train:
        return out
    segments = text_rows.open_segments(config, run, run.folder("words"), new.vocab_size)
    numbers, _ = hyperparameters.derive_numbers(config, new.vocab_size, segments[0], begun, parent)
    model = trainer.load_start(begun, config, device)
    only = OnlyRows(model, tables(model), old.vocab_size, new.vocab_size)
    log.say(f"training {new.vocab_size - old.vocab_size:,} rows of each table alone, everything else is frozen")
    hooks = {"rows": only}
    spec = text_rows.next_token_spec(config, run, model, segments, run.folder("words"), numbers, parent, beside=hooks)
    return out | trainer.run_training(config, run, spec, device, parent)


def begin(config: ExtendVocab, run: RunDir, out: Path) -> None:
    """Writes the model with new tokens whose rows nothing has trained."""
    words = run.folder("words")
    found = extend_tokenizer(run.input("model"), texts(run.input("data"), "train"), config.add, words)
    log.say(f"{len(found.pieces):,} new tokens, the first of them {', '.join(map(repr, found.texts[:12]))}")
    model = extend_model(load(run.input("model")), found.first, found.pieces, config.rows)
    save_model(model, out, words, stop_ids=TokenizerFolder.open(words).stop_ids)


def compare(old: TokenizerFolder, new: TokenizerFolder, records: Path) -> dict[str, Any]:
    """Bytes a token of held-out text with both tokenizers, as facts, printed."""
    before, after = (measure(words, texts(records, "validation"))["bytes_per_token"] for words in (old, new))
    log.say(
        f"held-out text of the field: {before:.2f} bytes a token before, {after:.2f} after ({before / after - 1:+.1%} tokens)"
    )
    return {"tokens_added": new.vocab_size - old.vocab_size, "bytes_per_token_before": before, "bytes_per_token": after}
