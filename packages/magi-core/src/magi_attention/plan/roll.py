# SPDX-License-Identifier: Apache-2.0
"""Which rows travel when the sequence is rolled."""

from functools import lru_cache

import numpy as np

from magi_attention.common.intervals import intersect
from magi_attention.plan.exchange import ExchangeTable
from magi_attention.plan.layout import Layout


@lru_cache(maxsize=64)  # the same few shifts come back in every layer and step
def roll_exchange(layout: Layout, rank: int, shift: int) -> ExchangeTable:
    """One rank's exchange after which its local row at global position g holds row ``(g - shift) mod num_real``.

    Padding takes no part: the receive buffer holds the rank's real rows only, which are its first.
    """
    num_real = layout.num_real
    start, stop, owner, local = layout.runs[layout.runs[:, 0] < num_real].T
    targets = np.column_stack([start, np.minimum(stop, num_real)])
    # Targets in the rows before `shift` take from the sequence's end, the others from its beginning.
    halves = np.array([[0, shift % num_real], [shift % num_real, num_real]])
    pieces, run, half = intersect(targets, halves)
    sources = pieces - shift % num_real + np.where(half == 0, num_real, 0)[:, None]
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
