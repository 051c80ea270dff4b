# SPDX-License-Identifier: Apache-2.0
"""Carry out ``magi precompile``."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from magi_attention.cli.precompile.worker import Outcome, Task, compile_all
from magi_attention.env.build import kernel_cache_dir

STATUSES = ("compiled", "cached", "failed")


def run_precompile(tasks: Sequence[Task], jobs: int, console: Console) -> int:
    """Compile and print a summary; returns the exit code: 0, or 1 if a case failed."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    outcomes: list[Outcome] = []
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("Compiling", total=len(tasks))
        for outcome in compile_all(tasks, jobs):
            outcomes.append(outcome)
            progress.update(bar, advance=1, description=escape(str(outcome.task.case)))
        progress.update(bar, description="Compiled")
    console.print(summary(outcomes))
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    for outcome in failed:
        console.print(
            f"[bold red]failed[/bold red] {escape(outcome.task.backend)}, {escape(str(outcome.task.case))}: "
            f"{escape(outcome.reason)}",
            highlight=False,
        )
    console.print(f"Kernels are kept in {escape(str(kernel_cache_dir()))}.", highlight=False)
    return int(bool(failed))


def summary(outcomes: Sequence[Outcome]) -> Table:
    """How many cases of each backend and architecture were compiled, were there already, or failed."""
    table = Table("backend", "architecture", *STATUSES, "seconds", title="Kernels", title_justify="left")
    by_group: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        by_group.setdefault((outcome.task.backend, outcome.task.case.arch), []).append(outcome)
    for (backend, arch), group in sorted(by_group.items()):
        counts = [sum(outcome.status == status for outcome in group) for status in STATUSES]
        seconds = sum(outcome.seconds for outcome in group)
        table.add_row(escape(backend), arch, *map(str, counts), f"{seconds:.1f}")
    table.caption = "Seconds are those of all processes together."
    return table
