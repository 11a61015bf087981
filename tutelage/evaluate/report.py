"""The report: one self-contained HTML page about a run and everything it came from. No script, no network, no other file."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from tutelage import __version__, log
from tutelage.evaluate import report_charts as charts
from tutelage.evaluate import report_data as data
from tutelage.evaluate.report_data import Node, Story
from tutelage.evaluate.report_models import Finding, bars, findings
from tutelage.files import whole_file


def write_report(run: Path, out: Path, scores: Sequence[Path] = ()) -> list[str]:
    """Writes the page of a run directory to the file `out`, prints its verdict, and returns it: sentences about the model of the
    run, those first that say where it is worse. `scores`: folders of evaluations that come before those found by lineage.

    Raises `ArtifactError` if `run` is not a run directory. Whatever else is missing is left out, and the page says why.
    """
    story = data.read_story(run, scores)
    page = render(story)
    with whole_file(out) as f:
        f.write(page)
    verdict = [finding.text for finding in _findings(story)]
    for line in verdict:
        log.say(line)
    log.say(f"report: {out} ({len(page.encode()) / 1e3:.0f} kB, one file, opens offline)")
    return verdict


def render(story: Story) -> str:
    """The page as text. Everything that comes from files is escaped; only our own SVG is markup."""
    env = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.ChainableUndefined)
    env.filters |= FILTERS
    source = (resources.files("tutelage.evaluate") / "report.html.jinja").read_text(encoding="utf-8")
    return env.from_string(source).render(**context(story))


def context(story: Story) -> dict[str, Any]:
    """What the template sees."""
    training = [_training(node, story) for node in story.training()]
    if not training:
        story.left_out.append(("Learning curves", "no run of this chain has a metrics.jsonl with losses"))
    cards = [c for c in (_card(node) for node in story.chain) if c]
    if not cards:
        story.left_out.append(("Data", "no run of this chain wrote a data card"))
    tokenizer = next((t for t in (_tokenizer(n) for n in story.chain) if t), None)
    if tokenizer is None:
        story.left_out.append(("Tokenizer", "no tokenizer was trained in this chain"))
    total_wh = [data.energy(n) for n in story.chain]
    whole = next((n for n in reversed(story.chain) if n.kind == "model"), None)
    name = story.model.name if story.model else story.run.name
    if not story.measured():
        story.left_out.append(("Scores", f"no finished evaluation of {name} was found: `tutelage evaluate` makes one"))
    learnt = [story.run, *story.training()]  # its own samples, else those of the first that has any
    growth = next(((n.name, s) for n, s in ((n, data.training_samples(n)) for n in learnt) if len(s) > 1), ("", []))
    return {
        "title": f"{story.run.path.parent.name} / {story.run.name}",
        "version": __version__,
        "run": story.run,
        "name": name,
        "findings": _findings(story),
        "documents": _documents(story),
        "questions": list(story.model.questions.items()) if story.model else [],
        "tasks": [t for q in story.model.questions.values() for t in q.get("tasks") or []] if story.model else [],
        "definitions": {k: v for m in reversed(story.measured()) for k, v in m.definitions.items()},
        "samples": story.model.samples if story.model else {},
        "others": [m for m in story.measured() if m is not story.model],
        "effects": [(n.name, found) for n in story.chain if (found := _effect(n))],
        "rewarded": [(n.name, n.facts) for n in story.chain if isinstance(n.facts.get("held_out_gain"), dict)],
        "compared": [(m.name, c) for m in story.measured() for c in m.comparisons if c.get("questions")],
        "growth": growth[1],
        "growth_of": growth[0],
        "training": training,
        "cards": cards,
        "tokenizer": tokenizer,
        "chain": story.chain,
        "costs": [_cost(n) for n in story.chain],
        "seconds": sum(n.seconds for n in story.chain),
        "energy_wh": sum(e["wh"] for e in total_wh),
        "energy_how": sorted({e["how"] for e in total_wh}),
        "plans": [(n.name, rows) for n in story.chain if (rows := data.plan_rows(n))],
        "parameters": _parameters(story),
        "model_path": None if whole is None else _shown(whole, story),
        "left_out": list(dict.fromkeys(story.left_out)),
    }


def _findings(story: Story) -> list[Finding]:
    """The verdict on the model of the run; of a run that `evaluate` does not measure, what it says of itself."""
    verdict = story.run.facts.get("verdict")
    if story.model is not None and (story.measured() or not isinstance(verdict, str)):
        return findings(story.model, story.parents)
    return [
        Finding(
            verdict
            if isinstance(verdict, str)
            else f"{story.run.name} has not been measured: no finished evaluation of it was found."
        )
    ]


def _documents(story: Story) -> list[dict[str, Any]]:
    """Each set of held-out documents that the model was measured on, with the bars of its figure."""
    if story.model is None:
        return []
    return [
        {**found, "data": name, "bars": bars(story.model, story.parents, name)}
        for name, found in story.model.documents.items() if found.get("rows")
    ]  # fmt: skip


def _effect(node: Node) -> dict[str, Any] | None:
    """What training changed on held-out text, as `adapt` measures it; runs of older versions call it `change`."""
    found = node.facts.get("adaptation_effect", node.facts.get("change"))
    return found if isinstance(found, dict) else None


def _training(node: Node, story: Story) -> dict[str, Any]:
    """Curves and last values of one training run."""
    out: dict[str, Any] = {"node": node, "rates": data.rates(node), "panels": []}
    rewarded = any("rollout/reward" in row for row in node.metrics)  # a loss of policy gradients says nothing: the reward does
    x, y = data.column(node, "rollout/reward" if rewarded else "loss")
    vx, vy = data.column(node, "probe/reward" if rewarded else "validation_loss")
    if rewarded:
        out["reward"] = {"training": y[-1] if y else None, "held_out": vy[-1] if vy else None}
    even = charts.smoothed(y)
    # the first steps fall from ln(vocabulary) and would flatten everything after them
    settled = even[max(1, len(even) // 16) :]
    top = max(settled, default=None) if len(even) > 60 and not rewarded else None
    name = f"c{story.chain.index(node)}"
    lines = [
        charts.Curve(x, y, colour=charts.FIRST_SOFT, width=0.8), charts.Curve(x, even, "training", width=1.9),
        charts.Curve(vx, vy, "held-out", colour=charts.SECOND, dots=True),
    ]  # fmt: skip
    try:
        out["loss"] = Markup(charts.chart(lines, name=f"{name}-loss", size=(7.2, 3.1), y_top=top and top * 1.04))
        for key, title in PANELS:
            px, py = data.column(node, key)
            if len(px) > 1:
                svg = charts.chart([charts.Curve(px, py)], name=f"{name}-{key}", size=(3.5, 1.55), percent=key == "mfu")
                out["panels"].append({"title": title, "svg": Markup(svg), "last": py[-1], "percent": key == "mfu"})
    except ImportError:
        story.left_out.append(("Learning curves", 'they need matplotlib: pip install "tutelage[report]"'))
    return out


PANELS = (
    ("bits_per_byte", "Held-out bits per byte"),
    ("tokens_per_second", "Tokens per second"),
    ("lr", "Learning rate, first parameter group"),
    ("grad_norm", "Gradient norm before clipping"),
    ("mfu", "Share of the machine's measured matrix-product rate"),
    ("term/accuracy", "Pairs in the right order"),
    ("rollout/length", "Tokens per answer"),
    ("rollout/zero_variance_share", "Prompt groups whose answers all have the same reward"),
    ("term/entropy", "Entropy, nats per token"),
    ("rollout/kl", "KL divergence from the reference, nats per token"),
)


def _card(node: Node) -> dict[str, Any] | None:
    card = data.card(node)
    if not isinstance(card, dict):
        return None
    histogram = data.length_histogram(node)
    tallest = max((b["count"] for b in histogram), default=1) if histogram else 1
    rejected = card.get("rejected") if isinstance(card.get("rejected"), dict) else {}
    return {"node": node, **card, "rejected": rejected, "histogram": histogram, "tallest": tallest}


def _tokenizer(node: Node) -> dict[str, Any] | None:
    if node.kind != "tokenizer" and node.stage != "tokenizer":
        return None
    report = data._quiet_json(node.path / "compression.json")
    return {"node": node, "facts": node.facts, "report": report if isinstance(report, dict) else {}}


def _cost(node: Node) -> dict[str, Any]:
    rates = data.rates(node) if node.metrics else {}
    return {"node": node, "energy": data.energy(node), **rates}


def _parameters(story: Story) -> float | None:
    for node in reversed(story.chain):
        found = data.number(node.facts.get("parameters")) or data.stored_parameters(node.path / "model")
        if found is not None:
            return found
    return data.number(story.model.facts.get("parameters")) if story.model else None


def _shown(model: Node, story: Story) -> str:
    """The model folder as a person would type it: relative to the folder that holds `runs`."""
    runs = model.path.parent.parent
    relative = model.path.relative_to(runs.parent) if runs.name == "runs" else model.path
    return f"{relative}/model"


def number(value: Any) -> str:
    found = data.number(value)
    if found is None:
        return str(value)
    if found == int(found) and abs(found) < 1e15:
        return f"{int(found):,}"
    return f"{found:,.3g}" if abs(found) < 1000 else f"{found:,.0f}"


def duration(seconds: Any) -> str:
    """75 -> 1 min 15 s."""
    found = data.number(seconds)
    if found is None:
        return "?"
    if found < 10:
        return f"{found:.1f} s"
    minutes, rest = divmod(round(found), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def size(value: Any) -> str:
    """Bytes: 2300000 -> 2.3 MB."""
    found = data.number(value)
    if found is None:
        return "?"
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if found >= limit:
            return f"{found / limit:.1f} {unit}"
    return f"{found:.0f} B"


def scientific(value: Any) -> str:
    """1.2e15 -> 1.2 × 10¹⁵."""
    found = data.number(value)
    if not found:
        return "?" if found is None else "0"
    mantissa, exponent = f"{found:.1e}".split("e")
    return f"{mantissa} × 10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def percent(value: Any, digits: int = 1) -> str:
    found = data.number(value)
    return "?" if found is None else f"{found:.{digits}%}"


def planned(value: Any, what: str) -> str:
    """A planned or measured value in the unit that its name tells."""
    if "seconds" in what:
        return duration(value)
    if "bytes" in what:
        return size(value)
    return scientific(value) if "flops" in what else percent(value) if what == "mfu" else number(value)


def words(key: Any) -> str:
    return str(key).replace("_", " ")


FILTERS = {
    "num": number, "duration": duration, "size": size, "sci": scientific, "pct": percent, "short": charts.short,
    "planned": planned, "words": words,
}  # fmt: skip
