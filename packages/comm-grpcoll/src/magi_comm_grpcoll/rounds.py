# SPDX-License-Identifier: Apache-2.0
"""An exchange in several rounds, each of which needs less memory. Knows numpy alone.

A round takes a window of every rank's source rows. So a row's partial results all come back in one round, and a reduce
in rounds has the bits of a reduce at once.
"""

from collections.abc import Sequence

import numpy as np

from magi_attention.plan.exchange import ExchangeTable
from magi_comm_grpcoll.tables import Ints, RowCopies, cast_copies

MOST_ROUNDS = 1 << 12


def split_rounds(tables: Sequence[ExchangeTable], num_rounds: int) -> list[list[ExchangeTable]]:
    """For each round the tables of all ranks; they name rows of the whole source and of the whole receive buffer."""
    runs = [cast_copies(tables, rank) for rank in range(len(tables))]
    return [_round(tables, runs, number, num_rounds) for number in range(num_rounds)]


def _round(
    tables: Sequence[ExchangeTable], runs: Sequence[RowCopies], number: int, num_rounds: int
) -> list[ExchangeTable]:
    kept = []
    for table, run in zip(tables, runs, strict=True):
        first, stop = (table.num_source * edge // num_rounds for edge in (number, number + 1))
        start = np.maximum(run.source, first)
        rows = np.minimum(run.source + run.rows, stop) - start
        inside = RowCopies(run.peer, start, run.target + start - run.source, rows)
        kept.append(RowCopies(*(column[rows > 0] for column in inside)))
    return [
        ExchangeTable(
            send=_ranges(kept[rank].peer, kept[rank].source, kept[rank].rows),
            recv=np.concatenate([_received(run, source, rank) for source, run in enumerate(kept)]),
            num_ranks=table.num_ranks,
            num_source=table.num_source,
            num_received=table.num_received,
        )
        for rank, table in enumerate(tables)
    ]


def _received(run: RowCopies, source: int, rank: int) -> Ints:
    here = run.peer == rank
    return _ranges(np.full(here.sum(), source), run.target[here], run.rows[here])


def _ranges(peer: Ints, start: Ints, rows: Ints) -> Ints:
    return np.column_stack([peer, start, start + rows])


def packed(table: ExchangeTable) -> tuple[ExchangeTable, Ints]:
    """The table with its received rows one after another, and which row of the whole buffer each of them is."""
    rows = table.recv[:, 2] - table.recv[:, 1]
    stop = np.cumsum(rows)
    whole = [np.arange(first, last) for _, first, last in table.recv.tolist()]
    recv = _ranges(table.recv[:, 0], stop - rows, rows)
    total = int(rows.sum())
    together = ExchangeTable(table.send, recv, table.num_ranks, table.num_source, total)
    return together, np.concatenate([np.empty(0, np.int64), *whole])
