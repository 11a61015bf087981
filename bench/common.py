"""Shared pieces of the benchmarks: the model and rows of the pretraining job, step times, memory, output.

Every script prints one JSON line a job. Steps during which the rest of the machine used over 5% of the cores are left out of
the rates where at least three quiet ones remain.
"""

from __future__ import annotations

import json
import os
import pydoc_data.topics
import statistics
import sys
import time
from pathlib import Path
from typing import Any

VOCAB, SEQUENCE, BATCH = 4096, 512, 16
QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 768,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}


def _status_mb(key: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next((round(int(x.split()[1]) / 1024, 1) for x in lines if x.startswith(key)), 0.0)


def rss_mb() -> float:
    """Memory that this process holds now."""
    return _status_mb("VmRSS:")


def peak_rss_mb() -> float:
    """The most memory that this program has held. Not ru_maxrss, which is at least what the parent held when it started it."""
    return _status_mb("VmHWM:")


def others() -> float:
    """CPU seconds that everything but this process and its children has used so far, stolen time included."""
    tick = os.sysconf("SC_CLK_TCK")
    values = [int(x) / tick for x in Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:]]
    return values[0] + values[1] + values[2] + values[7] - sum(os.times()[:4])


class Steps:
    """A stop-watch: `begin()`, then `mark(amount)` at the end of each step."""

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup
        self.seconds: list[float] = []
        self.amounts: list[float] = []
        self.noise: list[float] = []
        self.last, self.used = 0.0, 0.0

    def begin(self) -> None:
        self.last, self.used = time.perf_counter(), others()

    def mark(self, amount: float) -> None:
        now, used = time.perf_counter(), others()
        took = now - self.last
        self.seconds.append(took)
        self.amounts.append(amount)
        self.noise.append((used - self.used) / took / (os.cpu_count() or 1))
        self.last, self.used = now, used

    def fields(self, unit: str = "tokens") -> dict[str, Any]:
        timed = range(self.warmup, len(self.seconds))
        quiet = [i for i in timed if self.noise[i] < 0.05]
        use = quiet if len(quiet) >= 3 else list(timed)
        rates = [self.amounts[i] / self.seconds[i] for i in use]
        return {
            f"{unit}_per_s": round(sum(self.amounts[i] for i in use) / sum(self.seconds[i] for i in use), 2),
            f"{unit}_per_s_median": round(statistics.median(rates), 2),
            "step_s_median": round(statistics.median(self.seconds[i] for i in use), 4),
            "first_step_s": round(self.seconds[0], 2),
            "timed_steps": len(timed),
            "quiet_steps": len(quiet),
        }


def emit(job: str, peer: str, **fields: Any) -> None:
    print(json.dumps({"job": job, "peer": peer, "peak_rss_mb": peak_rss_mb(), **fields}), flush=True)
    sys.stdout.flush()


def make_rows(file: Path, count: int, length: int = SEQUENCE) -> None:
    """`count` rows of real text as a numpy file: Python's language reference, in a byte-level BPE of 4096 entries.

    Used where the peers' own rows are not at hand.
    """
    import numpy as np
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    text = "\n\n".join(pydoc_data.topics.topics.values())
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|end|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special, show_progress=False, initial_alphabet=alphabet)
    words.train_from_iterator([text], trainer)
    ids = np.array(words.encode(text).ids, np.int64)
    starts = np.random.default_rng(0).integers(0, len(ids) - length, count)
    np.save(file, np.stack([ids[i : i + length] for i in starts]))
