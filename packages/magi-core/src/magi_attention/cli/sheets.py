# SPDX-License-Identifier: Apache-2.0
"""Tables as values, which a terminal and a web page show alike, and the table of what each rank does."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from magi_attention.cli.figures import MOST_SHOWN_RANKS, QUANTILES, PlanFigures, saved_share, short


@dataclass(frozen=True)
class Sheet:
    """A table.

    Attributes:
        title: what it shows.
        columns: the columns' names; the first column names the rows.
        rows: cells, row by row.
        summary: a last row that stands for all; empty for none.
        caption: what the words mean.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    summary: Sequence[str] = ()
    caption: str = ""

    def for_terminal(self) -> Table:
        """The table as rich prints it."""
        table = Table(title=self.title, caption=self.caption or None)
        for name in self.columns:
            table.add_column(name, justify="right")
        for row in self.rows:
            table.add_row(*row)
        if self.summary:
            table.add_section()
            table.add_row(*self.summary, style="bold")
        return folding(table)


def folding(table: Table) -> Table:
    """Break what is too long for a narrow terminal into lines, where rich would cut it off."""
    for column in table.columns:
        column.overflow = "fold"
    return table


def rank_sheet(figures: PlanFigures, title: str) -> Sheet:
    """Show what each rank holds, computes and exchanges; of many ranks the quantiles, each column sorted by itself."""
    columns = (figures.work.tokens, figures.pairs, figures.received, figures.sent)
    mean = max(figures.pairs.mean(), 1)
    others = figures.rows_of_others
    if figures.num_ranks <= MOST_SHOWN_RANKS:
        values = {str(rank): [int(column[rank]) for column in columns] for rank in range(figures.num_ranks)}
        saved = [f"{saved_share(figures.received[rank], others[rank]):.0%}" for rank in range(figures.num_ranks)]
        of_each = ""
    else:
        values = {name: [_quantile(column, share) for column in columns] for name, share in QUANTILES.items()}
        saved = [""] * len(values)
        of_each = f"Each column is sorted by itself: {', '.join(QUANTILES)} of {figures.num_ranks:,} ranks. "
    return Sheet(
        title=title,
        columns=("rank", "tokens", "pairs computed", "of mean", "rows received", "rows sent", "saved"),
        rows=[
            (name, *_cells(numbers, f"{numbers[1] / mean:.1%}"), part)
            for (name, numbers), part in zip(values.items(), saved, strict=True)
        ],
        summary=(
            "all",
            *_cells([int(column.sum()) for column in columns], f"≤ {figures.imbalance:.1%}"),
            f"{saved_share(figures.received.sum(), others.sum()):.0%}",
        ),
        caption=of_each
        + f"{_tokens(figures)} A pair is a query and a key that it sees. {_row(figures)}, received from another "
        "rank in one layer's forward. Saved is relative to an all-gather, which "
        f"brings each rank all rows that it does not hold ({others.sum():,} in all), or a ring, which passes the same "
        "rows through it.",
    )


def _tokens(figures: PlanFigures) -> str:
    return f"Tokens are those {'of the queries ' * figures.is_cross}that the rank holds."


def _row(figures: PlanFigures) -> str:
    queries = ", or its query" if figures.work.queries_travel.any() else ""
    hops = ", in either hop" if (figures.work.hops > 1).any() else ""
    return f"A row is one token's key and value{queries}{hops}"


def _quantile(column: NDArray[np.int64], share: float) -> int:
    return int(np.quantile(column, share, method="nearest"))


def _cells(numbers: Sequence[int], of_mean: str) -> tuple[str, ...]:
    tokens, pairs, received, sent = numbers
    return f"{tokens:,}", _narrow(pairs), of_mean, _narrow(received), _narrow(sent)


def _narrow(number: int) -> str:
    """The number, or three digits of it where all would make a table too wide for a terminal of 80 columns."""
    return f"{number:,}" if number < 10**8 else short(number)
