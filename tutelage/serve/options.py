"""How a server listens, what it lets in, and how it runs its models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tutelage.serve.app import MAX_BODY


@dataclass(slots=True, frozen=True, kw_only=True)
class Options:
    """Of `serve` in `listen.py`."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: a free one
    insecure: bool = False  # listen beyond this machine without keys
    api_keys: tuple[str, ...] = ()  # unlimited keys for inference
    keys: Path | None = None  # a file of `tutelage keys`
    allow_models: tuple[Path, ...] = ()  # folders that POST /admin/models may load from
    max_waiting: int = 256  # requests are refused with 429 while so many answers of their model wait already
    max_body: int = MAX_BODY  # bytes of a request
    max_connections: int = 1000  # at a time; fewer where the system allows fewer open files
    request_seconds: float = 60.0  # how long a client may take to send a request, head and body
    load_seconds: float = 600.0  # how long POST /admin/models waits for a model
    drain_seconds: float = 30.0  # how long answers may go on after SIGTERM
    engine: str = "tutelage"  # a row of `engines.py`
    slots: int | None = None  # answers of one model that run at a time; the engine's own number where None
    max_length: int | None = None  # tokens of prompt and answer; the model's context where None
    device: str = "cpu"  # of our engine
    cache_gib: float = 2.0  # of our engine: keys and values in memory at a time
    dtype: str | None = None  # of the weights; float32 where None (vLLM: as stored), or int8 through our kernels
    prefix_cache: bool = True  # prompts start from what they have in common with earlier ones
    speculate: int = 0  # guesses at the next tokens that are checked per step
    draft: Path | None = None  # a smaller model with the same tokens, which makes the guesses
    batch_invariant: bool = False  # bitwise equal answers whatever else runs
    vllm: Mapping[str, Any] = field(default_factory=dict)  # further arguments of vLLM
    store: Path | None = None  # a file that keeps responses; made where there is none
    store_days: int = 30  # how long a response is kept after it was made or last continued
