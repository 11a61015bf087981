"""What a data stage reads that no artifact holds: the content of its sources."""

from __future__ import annotations

from tutelage.config.stages import Data
from tutelage.data.readers import source_digest


def digest(config: Data) -> str:
    """Digest of the content of every source: editing a file makes the stage run again, moving it does not."""
    return f"{source_digest(config.sources)} {source_digest(config.validation_sources)}"
