"""Starts vLLM on a model folder. Nothing is downloaded or reported, no pickle is read, no code from the folder runs."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tutelage.errors import ArtifactError, ConfigError, MissingExtra
from tutelage.models.folder import check_folder, refuse_scorer

FIXED: dict[str, Any] = {
    "runner": "generate", "load_format": "safetensors", "trust_remote_code": False, "generation_config": "vllm",
    "max_logprobs": -1, "logprobs_mode": "raw_logprobs", "structured_outputs_config": {"backend": "guidance"},
    "speculative_config": None, "disable_log_stats": False,
}  # fmt: skip
"""Arguments of vLLM that the rest relies on. Guesses would forbid min-p and biases."""
ALWAYS = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
UNLESS_SET = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_LOGGING_LEVEL": "WARNING"}  # who has threads must not fork


class Stats:
    """What vLLM's scheduler last said of itself, in the shape of one of its stat loggers."""

    waiting = 0  # requests that it has not taken up
    cache_usage = 0.0
    preemptions = 0

    def record(self, scheduler_stats: Any, iteration_stats: Any, **_: Any) -> None:
        if scheduler_stats is not None:
            self.waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
            self.cache_usage = scheduler_stats.kv_cache_usage
        if iteration_stats is not None:
            self.preemptions += iteration_stats.num_preempted_reqs

    def log(self) -> None:
        """Asked for now and then; nothing is logged."""

    def log_engine_initialized(self) -> None:
        """Asked for once; nothing is logged."""


def load(folder: Path, stats: Stats, more: Mapping[str, Any], **options: Any) -> Any:
    """vLLM's engine. `options` are its arguments, None where it is to choose; `more` are the user's. `stats` is kept up to date.

    Raises `ArtifactError` for a folder that it does not serve, `ConfigError` for an argument in `more` that it does not know or
    that is not free, `MissingExtra` without vLLM.
    """
    given: dict[str, Any] = {
        "model": str(folder), **FIXED, **{name: value for name, value in options.items() if value is not None}
    }  # fmt: skip
    if taken := sorted({*given, *options} & more.keys()):
        wanted = f"{given.get(taken[0])}, as it is here"
        raise ConfigError("this argument of vLLM is not free", field=taken[0], found=more[taken[0]], expected=wanted)
    config = _checked(folder)
    if given["dtype"] == "stored":
        given["dtype"] = config.get("dtype") or config.get("torch_dtype") or "auto"
    os.environ.update(ALWAYS)
    for name, value in UNLESS_SET.items():
        os.environ.setdefault(name, value)
    try:
        from vllm import EngineArgs, LLMEngine
    except ImportError as error:
        raise MissingExtra("vllm", "vllm", "--engine vllm") from error
    known = {f.name for f in dataclasses.fields(EngineArgs)}
    if unknown := sorted(more.keys() - known):
        near = difflib.get_close_matches(unknown[0], known, 1)
        fix = f"did you mean `{near[0]}`?" if near else None
        raise ConfigError("vLLM has no such argument", field="vllm", found=unknown[0], expected="a field of EngineArgs", fix=fix)
    with _as_artifact_error(folder):
        engine = LLMEngine.from_engine_args(EngineArgs(**given, **more), stat_loggers=[lambda config, index: stats])
    _watch(engine.engine_core)
    return engine


def _watch(core: Any) -> None:
    """Wakes who waits for a step of a process that was killed: vLLM notices the death, but its synchronous front end waits on."""
    from vllm.v1.engine.exceptions import EngineDeadError

    resources, outputs = core.resources, core.outputs_queue  # not `core`: vLLM cleans up when nobody holds that any more

    def watch() -> None:
        while not resources.engine_dead:
            time.sleep(0.5)
        outputs.put_nowait(EngineDeadError())

    threading.Thread(target=watch, name="vllm-watch", daemon=True).start()


def _checked(folder: Path) -> dict[str, Any]:
    """The folder's configuration."""
    config = check_folder(folder)
    refuse_scorer(folder)
    if config.get("is_encoder_decoder"):
        raise ArtifactError(
            "vLLM is not used for encoder-decoders here", file=folder / "config.json", field="is_encoder_decoder", found=True,
            fix="serve it with --engine tutelage",
        )  # fmt: skip
    return config


@contextlib.contextmanager
def _as_artifact_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise ArtifactError(
            f"vLLM does not serve this model: {' '.join(str(error).split())[:500]}", file=folder,
            fix="VLLM_LOGGING_LEVEL=INFO shows what it says; or serve it with --engine tutelage",
        ) from error  # fmt: skip
