"""Stage `data`: sources -> records artifact."""

from __future__ import annotations

from typing import Any

from tutelage.config.stages import Data
from tutelage.data.clean import card
from tutelage.data.clean.collect import collect
from tutelage.files import whole_folder
from tutelage.rundir import RunDir


def run(config: Data, run: RunDir) -> dict[str, Any]:
    settings = config.model_dump(exclude={"sources"})
    with whole_folder(run.folder("records")) as out:
        facts = collect(config.sources, out, **settings)
    card.show(facts)
    return facts
