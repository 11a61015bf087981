"""Train or validation: decided by a hash of the record alone, so that it stays where it is when data are added."""

from __future__ import annotations

import hashlib
from typing import Any

from tutelage.errors import ConfigError

TRAIN, VALIDATION = "train", "validation"


def position(key: str, seed: int = 0) -> float:
    """A number in [0, 1), uniform over keys and independent between seeds."""
    digest = hashlib.sha256(f"tutelage split {seed} {key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def side(key: str, meta: dict[str, Any], share: float, seed: int = 0) -> str:
    """`train` or `validation`.

    `meta["split"]` decides where a source has made its own split; records of one `meta["family"]` (questions about one
    function, say) stay together; otherwise `key` decides: a record's id, or what it shares with its like.
    Raises `ConfigError` for a share outside [0, 0.9].
    """
    check_share(share)
    own = meta.get("split")
    if own in (TRAIN, VALIDATION):
        return own if share > 0 else TRAIN
    return VALIDATION if position(str(meta.get("family") or key), seed) < share else TRAIN


def check_share(share: float) -> None:
    if not 0.0 <= share <= 0.9:
        raise ConfigError("not a share", field="validation_share", found=share, expected="0 to 0.9, for example 0.05")
