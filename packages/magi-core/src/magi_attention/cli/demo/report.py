# SPDX-License-Identifier: Apache-2.0
"""The tables of ``magi demo``."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from rich.table import Table

from magi_attention.cli.demo.train import StepResult
from magi_attention.cli.sheets import folding


@dataclass(frozen=True)
class Comparison:
    """The steps of both runs.

    Attributes:
        single: the steps on one process.
        several: the same steps on several processes.
        tolerance: the relative difference that the losses may have in the first steps.
    """

    single: Sequence[StepResult]
    several: Sequence[StepResult]
    tolerance: float

    @property
    def differences(self) -> list[float]:
        """Each step's difference of the losses, relative to the single process's."""
        return [abs(b.loss - a.loss) / abs(a.loss) for a, b in zip(self.single, self.several, strict=True)]

    def allowed(self, step: int) -> float:
        """The difference that a step's losses may have, counted from 1: training makes that of rounding grow.

        Tenfold in ten steps, where the loss leaves its first plateau; float64 shows that nothing else differs.
        """
        growth = 10 ** min((step - 20) / 10, 20)
        return max(self.tolerance, min(self.tolerance * growth, 1e-2))

    @property
    def disagreeing_steps(self) -> list[int]:
        """The steps, counted from 1, whose losses differ by more than is allowed or are not numbers."""
        return [step for step, difference in enumerate(self.differences, 1) if not difference <= self.allowed(step)]


def count_processes(number: int) -> str:
    """What the second run is called."""
    return f"{number} processes" if number > 1 else "1 process, as a rank"


def loss_table(comparison: Comparison, processes: int) -> Table:
    """Show both runs' losses, step by step."""
    table = Table(
        title="Loss per step",
        caption="Mean cross-entropy, nats per byte. Every step packs other documents: "
        "its mask is new, and is planned anew by every rank. The time includes their check that all planned the same.",
    )
    for name in ("step", "1 process", count_processes(processes), "relative difference", "planned in"):
        table.add_column(name, justify="right")
    disagreeing = set(comparison.disagreeing_steps)
    rows = zip(comparison.single, comparison.several, comparison.differences, strict=True)
    for step, (single, several, difference) in enumerate(rows, 1):
        table.add_row(
            str(step),
            f"{single.loss:.7f}",
            f"{several.loss:.7f}",
            f"{difference:.1e}",
            f"{several.planning_seconds * 1e3:.1f} ms",
            style="bold red" if step in disagreeing else None,
        )
    return folding(table)


def time_table(comparison: Comparison, processes: int) -> Table:
    """Show the seconds of both runs."""
    table = Table(
        title="Time",
        caption="Without the start of the processes. On a CPU each process computes with one thread, as if it were a "
        "device of its own; processes beyond the number of cores bring no speed.",
    )
    for name in ("", "training", "median step", "median planning"):
        table.add_column(name, justify="right")
    for name, steps in (("1 process", comparison.single), (count_processes(processes), comparison.several)):
        table.add_row(
            name,
            f"{sum(step.seconds for step in steps):.1f} s",
            f"{median(step.seconds for step in steps):.2f} s",
            f"{median(step.planning_seconds for step in steps) * 1e3:.1f} ms",
        )
    return folding(table)


def verdict(comparison: Comparison) -> str:
    """Say whether the runs agree, and how the loss went."""
    if steps := comparison.disagreeing_steps:
        return (
            f"The losses differ by more than {comparison.allowed(steps[0]):.2g} relative at {len(steps)} of "
            f"{len(comparison.differences)} steps; first at step {steps[0]}, "
            f"by {comparison.differences[steps[0] - 1]:.1e}."
        )
    allowed = comparison.allowed(len(comparison.differences))
    return (
        f"The losses of both runs agree at every step, to {max(comparison.differences):.1e} relative "
        f"(allowed: {allowed:.2g}). From the first step to the last they went from "
        f"{comparison.single[0].loss:.3f} to {comparison.single[-1].loss:.3f}."
    )
