# SPDX-License-Identifier: Apache-2.0
"""Which rows travel when the sequence is rolled."""

import numpy as np

from magi_attention.common.intervals import intersect
from magi_attention.plan.exchange import ExchangeTable
from magi_attention.plan.layout import Layout

# Shifts whose tables a layout keeps: many more than a model predicts tokens ahead.
MOST_SHIFTS = 64


def roll_exchange(layout: Layout, rank: int, shift: int) -> ExchangeTable:
    """One rank's exchange after which its local row at global position g holds row ``(g - shift) mod num_real``.

    Padding takes no part: the receive buffer holds the rank's real rows only, which are its first. The table is kept
    with the layout, since the same few shifts come back in every step; shifts that are drawn anew fill no memory.
    """
    shift %= layout.num_real
    tables: dict[int, ExchangeTable] = layout.derived(("rolls", rank), dict)
    table = tables.get(shift)
    if table is None:
        if len(tables) >= MOST_SHIFTS:
            tables.clear()
        table = tables[shift] = _build_exchange(layout, rank, shift)
    return table


def _build_exchange(layout: Layout, rank: int, shift: int) -> ExchangeTable:
    num_real = layout.num_real
    targets, owner, local = layout.real_runs[:, :2], layout.real_runs[:, 2], layout.real_runs[:, 3]
    # Targets in the rows before `shift` take from the sequence's end, the others from its beginning.
    halves = np.array([[0, shift], [shift, num_real]])
    pieces, run, half = intersect(targets, halves)
    sources = pieces - shift + np.where(half == 0, num_real, 0)[:, None]
    taken, piece, source_run = intersect(sources, layout.runs[:, :2])
    run = run[piece]
    arrival = (taken[:, 0] - sources[piece, 0]) + pieces[piece, 0] - targets[run, 0] + local[run]
    length = taken[:, 1] - taken[:, 0]
    departure = taken[:, 0] - layout.runs[source_run, 0] + layout.runs[source_run, 3]
    receiver, sender = owner[run], layout.runs[source_run, 2]
    order = np.lexsort((arrival, sender, receiver))
    mine = order[receiver[order] == rank]
    recv = np.column_stack([sender, arrival, arrival + length])[mine]
    sent = order[sender[order] == rank]
    send = np.column_stack([receiver, departure, departure + length])[sent]
    return ExchangeTable(send, recv, layout.num_ranks, int(layout.rows_per_rank[rank]), int(length[mine].sum()))
