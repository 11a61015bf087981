"""Stage `data`: sources -> records artifact."""

from __future__ import annotations

import inspect
from typing import Any

from tutelage.config.stages import Data
from tutelage.data import collect
from tutelage.files import whole_folder
from tutelage.rundir import RunDir


def run(config: Data, run: RunDir) -> dict[str, Any]:
    settings = config.model_dump(exclude={"sources"})
    known = inspect.signature(collect.collect).parameters
    assert set(settings) <= set(known), f"collect does not take {set(settings) - set(known)}"
    with whole_folder(run.folder("records")) as out:
        return collect.collect(config.sources, out, **settings)
