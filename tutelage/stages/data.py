"""Stage `data`: sources -> records artifact."""

from __future__ import annotations

from typing import Any

from tutelage.config.stages import Data
from tutelage.data import card
from tutelage.data.collect import collect
from tutelage.files import whole_folder
from tutelage.rundir import RunDir
from tutelage.stages.idle import refuse_idle


def run(config: Data, run: RunDir) -> dict[str, Any]:
    documents = config.kind == "documents"
    idle = ("fields",) if documents else ("text_field", "split", "chunk_chars", "min_chars")
    only = () if config.kind == "conversations" else ("format",)
    refuse_idle(config, {f"kind={config.kind}": (*idle, *only)})
    settings = config.model_dump(exclude={"sources"})
    with whole_folder(run.folder("records")) as out:
        facts = collect(config.sources, out, **settings)
    card.show(facts)
    return facts
