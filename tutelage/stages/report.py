"""Stage `report`: a run and all it came from -> one HTML page."""

from __future__ import annotations

from typing import Any

from tutelage.config.stages import Report
from tutelage.evaluate.report import write_report
from tutelage.rundir import RunDir


def run(config: Report, run: RunDir) -> dict[str, Any]:
    out = run.folder("report") / "report.html"
    verdict = write_report(run.input("run"), out, [run.input(k) for k in ("scores", "base_scores") if k in run.inputs])
    return {"bytes": out.stat().st_size, "verdict": verdict[0]}
