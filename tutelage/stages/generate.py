"""Command `generate`: every row of a file answered. What it makes is one file, so it is no run and has no run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tutelage import log
from tutelage.chat.render import Renderer
from tutelage.config.base import identity_of
from tutelage.config.stages import Generate
from tutelage.engine import Engine, Sampling
from tutelage.engine.protocol import EngineProtocol
from tutelage.errors import ConfigError
from tutelage.files import storage_errors
from tutelage.inference.batch import Job, Prompts, RowKind, check
from tutelage.inference.input_file import InputFile, opened
from tutelage.inference.output_file import ResumableOutput
from tutelage.inference.prompts import Prompting
from tutelage.models.open import load
from tutelage.references import find
from tutelage.rundir import Artifact
from tutelage.setup.trainer import choose_device
from tutelage.train.hooks import duration

OF_PROMPTS = ("column", "prompt_template", "chat", "system")
OF_SAMPLING = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "n", "stop", "beams", "length_penalty", "early_stopping",
    "no_repeat_ngram",
)  # fmt: skip


def run(config: Generate, runs: Path = Path("runs"), *, force: bool = False, dry_run: bool = False) -> dict[str, Any]:
    """Answers every row of `config.input` into `config.output`, or goes on with it. Returns rows, errors, tokens and seconds.

    Raises `DataError` for a row that cannot be answered (`on_error="stop"`), `ConfigError` for settings that do not fit together,
    or do not fit what is there of the output, and `StorageError` where it cannot be written.
    """
    output = Path(config.output).expanduser()
    sampling = Sampling(**{**{k: getattr(config, k) for k in OF_SAMPLING}, "stop": tuple(config.stop)})
    prompting = Prompting(config.column, config.prompt_template, config.chat, config.system)
    model = find(config.model, "model", runs)
    with storage_errors(output, "--output"), opened(config.input, output) as archive:
        if archive.path.resolve() == output.resolve():
            raise ConfigError("the output would replace the input", field="output", found=str(output), expected="another file")
        kind = kind_of(archive, config, model, Prompts(prompting, sampling, config.seed))
        rows = check(archive, kind, config.on_error)
        identity = {"input": archive.digest(), "model": model.digest, **identity_of(config)}
        if dry_run:
            log.say(f"{rows:,} rows: {kind.says}")
            return {"rows": rows}
        with ResumableOutput(output, identity, force, rows) as part:
            before = f", {part.rows:,} of them there already" if part.rows else ""
            log.say(f"{rows:,} rows{before}: {kind.says}")
            return _answer(config, Job(archive, kind, part, rows, config.on_error), model)


def kind_of(archive: InputFile, config: Generate, model: Artifact, prompts: Prompts) -> RowKind:
    """What the archive's first readable row says that all of them are."""
    first = next((entry.fields for entry in archive.entries() if entry.error is None), {})
    if not {"custom_id", "body"} <= first.keys():
        return prompts
    if given := sorted(config.model_fields_set & {*OF_PROMPTS, *OF_SAMPLING}):
        raise ConfigError(
            f"the rows of a batch file bring their own settings, so `{given[0]}` would have no effect", field=given[0],
            found=getattr(config, given[0]), fix="leave it out, or put it into the rows' bodies",
        )  # fmt: skip
    from tutelage.serve.openai_batch import Requests  # needs the server's libraries

    return Requests(model.name, config.seed)


def _engine(config: Generate, folder: Path) -> EngineProtocol:
    if config.engine == "tutelage":
        loaded: Any = load(folder, device=choose_device(config))
        return Engine(loaded, Renderer(folder), config.slots)
    if config.device != "auto":
        raise ConfigError("vLLM chooses the device itself", field="device", found=config.device, expected="auto")
    from tutelage.engine.vllm.engine import VllmEngine

    return VllmEngine(folder, Renderer(folder), config.slots)


def _answer(config: Generate, job: Job, model: Artifact) -> dict[str, Any]:
    part, meter = job.part, job.meter
    if part.rows < meter.rows:
        engine = _engine(config, model.path)
        try:
            with meter:
                job.kind.answer(job, engine, config.slots)
        except KeyboardInterrupt:
            log.say(f"interrupted after {part.rows:,} rows; the same command goes on")
            raise
        finally:
            engine.close()
    part.finish(meter.rows)
    facts = {
        "output": config.output, "rows": part.rows, "errors": part.failed, "prompt_tokens": part.prompt_tokens,
        "completion_tokens": part.answer_tokens, "tokens_per_second": round(meter.tokens / meter.seconds, 1),
        "seconds": round(meter.seconds, 2),
    }  # fmt: skip
    failed = f" ({part.failed:,} with an error)" if part.failed else ""
    log.say(
        f"{part.rows:,} rows{failed}, {part.prompt_tokens:,} tokens in, {part.answer_tokens:,} out, "
        f"{facts['tokens_per_second']:,.0f} tokens/s, {duration(meter.seconds)}"
    )
    return facts
