"""Commands that look: at runs, at one run, at this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from tutelage.cli.options import RUNS, Runs


def runs(
    like: Annotated[
        str | None, typer.Argument(help="Part of recipe/stage-digest, also with *; all runs where left out.")
    ] = None,
    stage: Annotated[str | None, typer.Option("--stage", metavar="STAGE", help="Only runs of this stage, such as sft.")] = None,
    status: Annotated[
        str | None,
        typer.Option(
            "--status", metavar="STATUS",
            help="Only runs with this status: done, failed, interrupted, killed, running, damaged or lost.",
        ),
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", metavar=" ", help="Remove the listed runs, after a question.")] = False,
    force: Annotated[
        bool, typer.Option("--force", metavar=" ", help="Remove even runs that others were made from, with --remove.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", metavar=" ", help="Remove without a question, with --remove.")] = False,
    runs: Runs = RUNS,
) -> None:  # fmt: skip
    """List runs: what they are, whether they finished, how long they took. With --remove: remove them."""
    from tutelage.cli.show import chosen_runs, show_runs
    from tutelage.errors import ConfigError

    rows = chosen_runs(runs, like, None if stage is None else stage.replace("-", "_"), status)
    if not remove:
        if force or yes:
            raise ConfigError("--force and --yes are about --remove", fix="leave them out, or add --remove")
        show_runs(rows, runs)
        return
    from tutelage.cli.removal import remove as remove_runs

    if like is None and stage is None and status is None:
        raise ConfigError(
            "say which runs to remove", field="remove", expected="a part of their names, --stage or --status",
            fix="tutelage runs --status failed --remove; or '*' for all",
        )  # fmt: skip
    remove_runs(runs, rows, needed_too=force, yes=yes)


def show(
    run: Annotated[str, typer.Argument(help="Run directory, or recipe/stage.")],
    rollouts: Annotated[bool, typer.Option("--rollouts", metavar=" ", help="Show the answers that RL learned from.")] = False,
    step: Annotated[
        int | None, typer.Option("--step", metavar="N", help="Step to show, with --rollouts; the last where left out.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", metavar="N", help="Number of prompts shown, with --rollouts.")] = 5,
    runs: Runs = RUNS,
) -> None:  # fmt: skip
    """Draw the chain from data to this run, with its numbers; or browse its rollouts."""
    from tutelage.cli.show import show_run
    from tutelage.cli.show_rollouts import show_rollouts

    if rollouts:
        show_rollouts(run, runs, step, limit)
    else:
        show_run(run, runs)


def doctor() -> None:
    """Check this machine: Python, torch, compiler, cores, memory, measured rates, optional libraries."""
    from tutelage.models import kernels
    from tutelage.plan.doctor import doctor as checks
    from tutelage.plan.doctor import print_doctor

    raise SystemExit(print_doctor(checks(kernels.why_not)))
