"""Stage `sft`: a checkpoint and conversations -> an assistant. The loss is on the assistant's words alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tutelage import log
from tutelage.config.stages import Sft
from tutelage.data.render import Renderer, check_supervision, coloured_sample
from tutelage.data.templates import style
from tutelage.files import whole_folder, write_json
from tutelage.records import Conversation, read_records
from tutelage.rundir import RunDir
from tutelage.stages import derived, extension, fitting, training
from tutelage.stages.unread import warn_of_unread_tokens
from tutelage.tokenizer.load import FILES, TokenizerFolder


def run(config: Sft, run: RunDir) -> dict[str, Any]:
    records = run.input("data")
    parent = extension.parent_of(config, run)
    tokenizer = run.input("model") if config.template is None else with_template(run, config.template)
    device = fitting.choose_device(config)
    model = fitting.load_start(run.input("model"), config, device, run.seed)
    segments = training.open_segments(config, run, tokenizer, model.config.vocab_size)
    show_sample(records, tokenizer)
    totals = segments[0].totals
    check_supervision(totals["supervised"], totals["tokens"], "chat")
    log.say(f"{totals['supervised']:,} of {totals['tokens']:,} tokens supervised ({totals['supervised'] / totals['tokens']:.0%})")
    warn_of_unread_tokens(config, model, segments[0], tuple(TokenizerFolder.open(tokenizer).stop_ids))
    numbers, _ = derived.derive_numbers(config, model.config.vocab_size, segments[0], run.input("model"), parent)
    return training.train_model(config, run, model, segments, tokenizer, numbers, device, parent)


def show_sample(records: Path, tokenizer: Path) -> None:
    """One rendered conversation, supervised tokens green (promise 1)."""
    first = next(read_records(records / "train.jsonl", Conversation))
    renderer = Renderer(tokenizer)
    for rendered in renderer.render(first)[:1]:
        log.console.print(coloured_sample(rendered, renderer.tokenizer))


def with_template(run: RunDir, name: str) -> Path:
    """A copy of the checkpoint's tokenizer with one of our chat templates."""
    source, chosen = run.input("model"), style(name)
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
