"""Which stage reads which records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tutelage.errors import ArtifactError, DataError
from tutelage.files import read_object
from tutelage.records import RECORD_TYPES, TYPES

READERS = {
    "Document": "tutelage pretrain", "Conversation": "tutelage sft", "Preference": "tutelage preference, or tutelage reward",
    "Rating": "tutelage reward, or tutelage preference --method kto", "Prompt": "tutelage rl", "Example": "tutelage classify",
}  # fmt: skip
"""Which stage learns from records of a type."""


def record_type(records: Path) -> str:
    """The type of the records of an artifact."""
    file = records / "schema.json"
    found = read_object(file).get("type")
    if not isinstance(found, str) or found not in TYPES:
        raise ArtifactError(
            "this does not say what the records are", file=file, field="type", found=found,
            expected=f"one of: {', '.join(TYPES)}", fix="run the stage that made the records again",
        )  # fmt: skip
    return found


def require_record_type(found: str, wanted: tuple[str, ...], *, maker: str | None = None, **where: Any) -> None:
    """Raises `DataError` for records of a type that is none of `wanted`; `maker` is the stage that will make them."""
    if found in wanted:
        return
    makers = [f"`tutelage data --kind {kind}`" for kind, name in RECORD_TYPES.items() if name in wanted]
    other = f"; what learns from these: {READERS[found]}" if found in READERS else ""
    raise DataError(
        "these are other records than this stage reads", found=f"{found}, which {maker} makes" if maker else found,
        expected=" | ".join(wanted), fix=f"make them with {' or '.join(makers) or '`tutelage sample`'}{other}", **where,
    )  # fmt: skip
