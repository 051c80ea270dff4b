# SPDX-License-Identifier: Apache-2.0
"""Which rows travel between two ranks: keys and values to the queries, or queries to the keys and outputs back.

A pair of ranks ``(reader, owner)`` stands for the part of the mask whose queries the reader owns and whose keys the
owner does. Either the keys that the part touches travel to the reader, or its queries travel to the owner, which sends
partial outputs back; the cheaper way is taken, pair by pair. Both ranks of a pair derive the same choice from the mask.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magi_attention.common import bands as band
from magi_attention.common.bands import Bands
from magi_attention.common.intervals import intersect, merge, overlaps
from magi_attention.plan.demand import Demand, lift, unlift
from magi_attention.plan.layout import Layout
from magi_attention.plan.totals import totals

# What travels is mostly bf16 or fp16; sums that are kept in high precision, and log-sum-exps, are float32.
BYTES, HIGH_PRECISION_BYTES = 2, 4


@dataclass(frozen=True)
class RowCosts:
    """Bytes that one row costs in the forward and the backward pass together."""

    keys: int
    queries: int

    @classmethod
    def of_heads(
        cls,
        num_heads_q: int,
        num_heads_kv: int,
        head_dim: int,
        *,
        forward_high_precision: bool = False,
        backward_high_precision: bool = False,
    ) -> "RowCosts":
        """The costs of rows of bf16 or fp16 heads.

        A key row brings k and v in either pass and takes dk and dv back. A query row brings q, takes out and lse back;
        in the backward pass it brings q, dout and two numbers per head, and takes dq back.
        """
        out = HIGH_PRECISION_BYTES if forward_high_precision else BYTES
        gradient = HIGH_PRECISION_BYTES if backward_high_precision else BYTES
        per_key_dim = 2 * BYTES + 2 * BYTES + 2 * gradient
        per_query_dim = BYTES + out + 2 * BYTES + gradient
        per_query_head = 3 * HIGH_PRECISION_BYTES
        return cls(
            keys=num_heads_kv * head_dim * per_key_dim,
            queries=num_heads_q * (head_dim * per_query_dim + per_query_head),
        )


@dataclass(frozen=True, eq=False)
class Directions:
    """What travels to and from one rank.

    Attributes:
        keys: ``(n, 3)`` rows ``(reader, start, stop)``: key rows that travel to their readers.
        queries: ``(n, 3)`` rows ``(owner, start, stop)``: query rows that travel to the owners of the keys they read.
        guests: bands, in global rows and columns, of the visiting queries with this rank's keys.
    """

    keys: NDArray[np.int64]
    queries: NDArray[np.int64]
    guests: Bands


def choose_directions(demand: Demand, layout: Layout, key_layout: Layout, rank: int, costs: RowCosts) -> Directions:
    """Choose for every pair that ``rank`` is part of. Rows of pairs without it are left out."""
    readers, owners = layout.runs[demand.run, 2], key_layout.runs[:, 2]
    mine, own = readers == rank, key_layout.runs[owners == rank]

    wanted = demand.remote[demand.remote[:, 0] == rank]
    asked = demand.remote[demand.remote[:, 0] != rank]
    to_me, _, run = intersect(wanted[:, 1:], key_layout.runs[:, :2])
    from_me, request, _ = intersect(asked[:, 1:], own[:, :2])
    read_from = totals(owners[run], np.diff(to_me)[:, 0], layout.num_ranks)
    read_by = totals(asked[request, 0], np.diff(from_me)[:, 0], layout.num_ranks)

    parts_out, _, run_out = _cut_by_keys(demand.bands[mine], key_layout.runs)
    parts_in, guest, _ = _cut_by_keys(demand.bands[~mine], own)
    reader_in = readers[~mine][guest]
    rows_out = _distinct_rows(parts_out, owners[run_out], layout)
    rows_in = _distinct_rows(parts_in, reader_in, layout)

    queries_go = read_from * costs.keys > _length_by_group(rows_out, layout) * costs.queries
    queries_come = read_by * costs.keys > _length_by_group(rows_in, layout) * costs.queries
    sent_queries = rows_out[queries_go[rows_out[:, 0]]]
    guests = parts_in[queries_come[reader_in]]
    visiting = merge(guests[:, : band.K0])
    return Directions(
        keys=np.concatenate(
            [
                np.column_stack([np.full(len(to_me), rank), to_me])[~queries_go[owners[run]]],
                np.column_stack([asked[request, 0], from_me])[~queries_come[asked[request, 0]]],
            ]
        ),
        queries=np.concatenate([sent_queries, np.column_stack([np.full(len(visiting), rank), visiting])]),
        guests=guests,
    )


def _cut_by_keys(bands: Bands, runs: NDArray[np.int64]) -> tuple[Bands, NDArray[np.int64], NDArray[np.int64]]:
    """Cut bands at the ends of runs of keys: the trimmed pieces, and the band and the run of each."""
    piece, run = overlaps(bands[:, band.K0 : band.D0], runs[:, :2])
    cut, kept = band.shrink(band.clip(bands[piece], band.K0, runs[run, 0], runs[run, 1]))
    return cut, piece[kept], run[kept]


def _distinct_rows(parts: Bands, group: NDArray[np.int64], layout: Layout) -> NDArray[np.int64]:
    """Rows ``(group, start, stop)`` of the queries of all parts of a group, sorted and disjoint within the group."""
    return unlift(merge(lift(parts[:, : band.K0], group, layout)), layout)


def _length_by_group(rows: NDArray[np.int64], layout: Layout) -> NDArray[np.int64]:
    return totals(rows[:, 0], rows[:, 2] - rows[:, 1], layout.num_ranks)
