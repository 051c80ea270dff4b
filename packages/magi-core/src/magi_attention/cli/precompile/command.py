# SPDX-License-Identifier: Apache-2.0
"""Carry out ``magi precompile``."""

from collections.abc import Sequence
from contextlib import closing

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
    progress = Progress(*columns, console=console, disable=not console.is_terminal)
    with progress, closing(compile_all(tasks, jobs)) as finished:
        bar = progress.add_task("Compiling", total=len(tasks))
        for outcome in finished:
            outcomes.append(outcome)
            progress.update(bar, advance=1, description=escape(str(outcome.task.case)))
            if not console.is_terminal:
                _tell(outcome, f"{len(outcomes)}/{len(tasks)}", console)
        progress.update(bar, description="Compiled")
    console.print(summary(outcomes))
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    _tell_failures(failed, console)
    if len(failed) < len(outcomes):
        folder = escape(str(kernel_cache_dir().absolute()))
        console.print(f"Kernels are kept in {folder}.", highlight=False, soft_wrap=True)
    return int(bool(failed))


def _tell(outcome: Outcome, count: str, console: Console) -> None:
    """Print a line for a log, where a bar that moves would show nothing until the end."""
    text = f"{count} {outcome.status} {_name_of(outcome)}, {outcome.seconds:.1f} s"
    console.print(escape(text), highlight=False, soft_wrap=True)
    console.file.flush()


def _tell_failures(failed: Sequence[Outcome], console: Console) -> None:
    """Print every reason once, and below it all that failed for it."""
    by_reason: dict[str, list[str]] = {}
    for outcome in failed:
        by_reason.setdefault(outcome.reason, []).append(_name_of(outcome))
    for reason, names in by_reason.items():
        console.print(f"[bold red]failed[/bold red] {escape(reason)}", highlight=False, soft_wrap=True)
        for name in names:
            console.print(f"  {escape(name)}", highlight=False, soft_wrap=True)


def _name_of(outcome: Outcome) -> str:
    return f"{outcome.task.backend}, {outcome.task.case}"


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
