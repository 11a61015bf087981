"""What stages read that no artifact holds: the content of sources, and of code that a reward or an environment is."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tutelage.config.rewards import Function, terms_of
from tutelage.config.stages import Data, Rl, Sample
from tutelage.data.sources.readers import source_digest
from tutelage.files import file_digest


def digest(config: Data) -> str:
    """Digest of the content of every source: editing a file makes the stage run again, moving it does not."""
    return f"{source_digest(config.sources)} {source_digest(config.validation_sources)}"


def code(config: Rl | Sample) -> str | None:
    """Digest of the files that hold the user's functions; None where there are none."""
    paths = [term.path for term in terms_of(config.rewards).values() if isinstance(term, Function)]
    if getattr(config, "environment", None):
        paths.append(str(config.environment))  # type: ignore[union-attr]
    found = [file for path in paths if (file := _file(path.rpartition(":")[0])) is not None]
    return " ".join(file_digest(file) for file in found) or None


def _file(name: str) -> Path | None:
    """The file of a module, or the file itself; None for one that is not there, which the stage itself complains about."""
    if name.endswith(".py"):
        return Path(name) if Path(name).is_file() else None
    here = Path(*name.split("."))  # where the worker looks first (rewards/user_code.py), and this process may not look at all
    for file in (here / "__init__.py", here.with_suffix(".py")):
        if file.is_file():
            return file
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec is not None and spec.origin and Path(spec.origin).is_file() else None
