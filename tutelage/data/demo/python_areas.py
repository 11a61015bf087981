"""`python-areas:`: docstrings of the standard library, each with the area that its module belongs to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files

import yaml

from tutelage.data.demo import python_docs
from tutelage.errors import ConfigError
from tutelage.records import Example

LEAST_WORDS = 8  # shorter docstrings ("Return the name.") belong anywhere


@cache
def areas() -> dict[str, str]:
    """The area of each package."""
    table = yaml.safe_load(files("tutelage.data.demo").joinpath("python_areas.yaml").read_text(encoding="utf-8"))
    return {module: area for area, modules in table.items() for module in modules}


def read(parameters: Mapping[str, str]) -> Iterator[Example]:
    """Examples in the order of modules. Parameter: `most` (of one area, 200), so that no area outweighs the others."""
    if unknown := set(parameters) - {"most", "seed"}:
        raise ConfigError("unknown parameter of python-areas:", found=sorted(unknown)[0], expected="most")
    most = parameters.get("most", "200")
    if not most.isdigit() or most == "0":
        raise ConfigError("not a whole number", field="python-areas:?most", found=most, expected="1, 2, 3, …")
    given: dict[str, list[Example]] = {}
    for module in python_docs.modules():
        area = areas().get(module.name.partition(".")[0])
        for entry in module.entries if area else ():
            if len(entry.doc.split()) >= LEAST_WORDS:
                source = f"python-areas:{entry.full_name}"
                made = Example.make(
                    entry.doc, source=source, licence=python_docs.LICENCE, label=area, meta={"title": entry.full_name}
                )
                given.setdefault(str(area), []).append(made)
    for _, found in sorted(given.items()):
        # By id, a hash of the text: from all over the area, and the same ones whatever else there is.
        yield from sorted(found, key=lambda e: e.id)[: int(most)]
