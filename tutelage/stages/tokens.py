"""Stage `tokens`: records and a tokenizer -> memory-mapped shards. Parallel; a killed run continues where it stopped."""

from __future__ import annotations

from typing import Any

from tutelage.config.stages import Tokens
from tutelage.data.tokens.shards import tokenize
from tutelage.rundir import RunDir


def run(config: Tokens, run: RunDir) -> dict[str, Any]:
    return tokenize(run.input("data"), run.input("tokenizer"), run.folder("tokens"), workers=config.workers or None)
