"""The confusion matrix as a picture: an SVG by matplotlib, darker cells for more texts."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np


def picture(table: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """An SVG of counts [K,K], rows the truth, coloured by their share of the row. Raises `ImportError` without matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure

    counts = np.asarray(table)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = 1.6 + 0.45 * len(names)
    settings: dict[str, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": "confusion", "font.size": 8, "font.family": "sans-serif",
        "text.parse_math": False,  # a class may be called `$5 to $10`
    }  # fmt: skip
    with matplotlib.rc_context(settings):  # type: ignore[arg-type]
        figure = Figure(figsize=(side + 0.8, side), layout="constrained")
        axes = figure.add_subplot()
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        places = range(len(names))
        axes.set_xticks(places, names, rotation=45, ha="right")
        axes.set_yticks(places, names)
        axes.set_xlabel("predicted")
        axes.set_ylabel("truth")
        for i in places:
            for j in places:
                if counts[i, j]:
                    axes.text(j, i, str(counts[i, j]), ha="center", va="center", color="white" if shares[i, j] > 0.5 else "black")
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return out.getvalue()
