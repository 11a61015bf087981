"""Stage `pretrain`: documents -> a language model, from scratch or on from a checkpoint (domain adaptation)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tutelage import log
from tutelage.config.stages import Pretrain
from tutelage.models.config import DecoderConfig
from tutelage.models.init import build
from tutelage.rundir import RunDir
from tutelage.setup import extend, hyperparameters, text_rows, trainer
from tutelage.tokenizer.load import TokenizerFolder


def run(config: Pretrain, run: RunDir) -> dict[str, Any]:
    parent = extend.parent_of(config, run)
    tokenizer = run.input("tokenizer" if config.model is None else "model")
    words = TokenizerFolder.open(tokenizer)
    device = trainer.choose_device(config)
    segments = text_rows.open_segments(config, run, tokenizer, words.vocab_size)
    numbers, shape = hyperparameters.derive_numbers(
        config, words.vocab_size, segments[0], run.input("model") if config.model else None, parent
    )
    model: Any = trainer.load_start(run.input("model"), config, device, run.seed) if config.model else fresh(config, words, shape)
    log.say(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    spec = text_rows.next_token_spec(config, run, model, segments, tokenizer, numbers, parent)
    return trainer.run_training(config, run, spec, device, parent)


def fresh(config: Pretrain, words: TokenizerFolder, shape: dict[str, Any]) -> Any:
    """A model with new weights, its special tokens those of the tokenizer."""
    settings = DecoderConfig.from_hf(shape, Path("architecture"))
    settings = settings.with_tokens(bos=words.bos_id, eos=tuple(words.stop_ids), pad=words.pad_id)
    return build(settings, config.seed)
