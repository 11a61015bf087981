"""Stage `sft`: a checkpoint and conversations -> an assistant. The loss is on the assistant's words alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tutelage import log
from tutelage.artifacts import tokenizer_folder
from tutelage.chat.render import Rendered, check_supervision, coloured_sample
from tutelage.chat.templates import style
from tutelage.config.stages import Sft
from tutelage.data.tokens.shards import Segments
from tutelage.files import whole_folder, write_json
from tutelage.rundir import RunDir
from tutelage.setup import extend, hyperparameters, text_rows, trainer
from tutelage.setup.replay import train_with_replay
from tutelage.setup.token_checks import warn_untrained_tokens
from tutelage.tokenizer.load import FILES, TokenizerFolder


def run(config: Sft, run: RunDir) -> dict[str, Any]:
    parent = extend.parent_of(config, run)
    tokenizer = run.input("model") if config.template is None else with_template(run, config.template)
    device = trainer.choose_device(config)
    model = trainer.load_start(run.input("model"), config, device, run.seed)
    segments = text_rows.open_segments(config, run, tokenizer, model.config.vocab_size)
    totals = segments[0].totals
    check_supervision(totals["supervised"], totals["tokens"], "chat")
    log.say(f"{totals['supervised']:,} of {totals['tokens']:,} tokens supervised ({totals['supervised'] / totals['tokens']:.0%})")
    warn_untrained_tokens(config, model, segments[0], tuple(TokenizerFolder.open(tokenizer).stop_ids))
    numbers, _ = hyperparameters.derive_numbers(config, model.config.vocab_size, segments[0], run.input("model"), parent)
    shown = text_rows.first_kept(segments[0], numbers.sequence_length, config.too_long)
    show_sample(segments[0], shown, tokenizer)
    spec = text_rows.next_token_spec(config, run, model, segments, tokenizer, numbers, parent)
    if config.general:
        return train_with_replay(config, run, spec, tokenizer, device, parent)
    return trainer.run_training(config, run, spec, device, parent)


def show_sample(segments: Segments, number: int, tokenizer: Path) -> None:
    """One segment as the model reads it, supervised tokens green (promise 1)."""
    rendered = Rendered(segments.ids(number), segments.mask(number), "", ())
    log.console.print(coloured_sample(rendered, TokenizerFolder.open(tokenizer)))


def with_template(run: RunDir, name: str) -> Path:
    """A copy of the checkpoint's tokenizer with one of our chat templates."""
    source, chosen = tokenizer_folder(run.input("model")), style(name)
    with whole_folder(run.folder("retemplated")) as out:
        for file in FILES:
            if (source / file).exists():
                shutil.copyfile(source / file, out / file)
        (out / "chat_template.jinja").write_text(chosen.source, encoding="utf-8")
        config = (
            json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))
            if (out / "tokenizer_config.json").exists()
            else {}
        )
        write_json(out / "tokenizer_config.json", {**config, "chat_template": chosen.source})
        (out / "tutelage.json").unlink(missing_ok=True)
    return run.folder("retemplated")
