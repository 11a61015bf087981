"""Which stage reads which records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tutelage.errors import DataError
from tutelage.files import read_json
from tutelage.records import KINDS

READERS = {
    "Document": "tutelage pretrain", "Conversation": "tutelage sft", "Preference": "tutelage prefer, or tutelage reward",
    "Rating": "tutelage reward, or tutelage prefer --method kto", "Prompt": "tutelage rl", "Example": "tutelage classify",
}  # fmt: skip
"""Which stage learns from records of a type."""


def type_of(records: Path) -> str:
    """The type of the records of an artifact."""
    return str(read_json(records / "schema.json")["type"])


def refuse_others(found: str, wanted: tuple[str, ...], *, maker: str | None = None, **where: Any) -> None:
    """Raises `DataError` for records of a type that is none of `wanted`; `maker` is the stage that will make them."""
    if found in wanted:
        return
    makers = [f"`tutelage data --kind {kind}`" for kind, name in KINDS.items() if name in wanted]
    other = f"; what learns from these: {READERS[found]}" if found in READERS else ""
    raise DataError(
        "these are other records than this stage reads", found=f"{found}, which {maker} makes" if maker else found,
        expected=" | ".join(wanted), fix=f"make them with {' or '.join(makers) or '`tutelage sample`'}{other}", **where,
    )  # fmt: skip
