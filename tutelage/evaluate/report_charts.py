"""Curves of the report: matplotlib SVG, with the page's own colours so that light and dark both work."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# matplotlib wants colours, the page wants CSS variables: each stand-in is replaced in the finished SVG
STAND_INS = {
    "#010101": "var(--muted)",
    "#010102": "var(--rule)",
    "#010103": "var(--c1)",
    "#010104": "var(--c2)",
    "#010105": "var(--c1-soft)",
}
MUTED, RULE, FIRST, SECOND, FIRST_SOFT = STAND_INS
POINTS = 700  # kept of a curve: more cannot be seen


@dataclass(slots=True, frozen=True)
class Curve:
    """One line."""

    x: Sequence[float]
    y: Sequence[float]
    label: str = ""
    colour: str = FIRST
    width: float = 1.6
    dots: bool = False


def chart(
    curves: Sequence[Curve], *, name: str, size: tuple[float, float], y_top: float | None = None, percent: bool = False
) -> str:
    """An SVG of `size` inches (72 units each), x = tokens. Raises `ImportError` without matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    settings: dict[str, Any] = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9, "font.family": "sans-serif"}
    with matplotlib.rc_context(settings):  # type: ignore[arg-type]
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        for curve in curves:
            marker: dict[str, Any] = {"marker": "o", "markersize": 3.5} if curve.dots else {}
            axes.plot(*_thinned(curve.x, curve.y), color=curve.colour, linewidth=curve.width, solid_capstyle="round", **marker)
        axes.grid(axis="y", color=RULE, linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(RULE)
        axes.tick_params(colors=MUTED, length=0, pad=5)
        axes.margins(x=0.01)
        if y_top is not None:
            axes.set_ylim(top=y_top)
        axes.xaxis.set_major_locator(MaxNLocator(4 if size[0] < 4 else 6))
        axes.yaxis.set_major_locator(MaxNLocator(3 if size[1] < 2 else 6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.0%}" if percent else short(y)))
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(out.getvalue(), name)


def smoothed(values: Sequence[float], share: float = 0.02) -> list[float]:
    """Average over about `share` of the curve, falling off to both sides: it does not lag behind a falling loss."""
    decay = 1 - 1 / max(4.0, share * len(values) / 2)
    ahead, behind = _decayed(values, decay), _decayed(values[::-1], decay)[::-1]
    return [(a + b) / 2 for a, b in zip(ahead, behind, strict=True)]


def _decayed(values: Sequence[float], decay: float) -> list[float]:
    """Exponential moving average without the pull towards zero at its start."""
    total = weight = 0.0
    out = []
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        out.append(total / weight)
    return out


def short(value: float) -> str:
    """1234567 -> 1.2M."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


def _thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    if len(x) <= POINTS:
        return list(x), list(y)
    keep = np.unique(np.linspace(0, len(x) - 1, POINTS).round().astype(int))
    return [x[i] for i in keep], [y[i] for i in keep]


def _inline(svg: str, name: str) -> str:
    """The <svg> element alone: scalable, page colours, ids that cannot meet those of another chart."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(
        r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", svg, flags=re.S
    )  # a style would hold for the whole page
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(\bid=")', rf"\g<1>{name}-", svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font: (\d+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    for stand_in, variable in STAND_INS.items():
        svg = svg.replace(stand_in, variable)
    # text is drawn in black unless told otherwise; every text here is an axis label
    return re.sub(r'<text style="(?![^"]*fill)', '<text style="fill: var(--muted); ', svg)
