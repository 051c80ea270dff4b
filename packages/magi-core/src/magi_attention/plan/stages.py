# SPDX-License-Identifier: Apache-2.0
"""Cut the rows that travel into overlap stages."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magi_attention.common.intervals import split_at
from magi_attention.plan.demand import Demand, lift, unlift
from magi_attention.plan.layout import Layout
from magi_attention.plan.rates import Cluster, LayerShape
from magi_attention.plan.totals import totals

# Neighboring ranks that are likely to share a node.
NODE = 8


@dataclass(frozen=True)
class StageOptions:
    """How to cut stages.

    Attributes:
        degree: number of remote stages; 0 for one kernel call over own and received rows; None to choose.
        max_degree: the largest degree to choose.
        min_piece: the fewest rows, but for the last piece, that are moved from one stage to another.
        max_pieces: the most pieces that a rank's remote rows are cut into.
        seconds_per_pair: predicted time to compute one (query, key) pair, in any unit; to choose without a cluster.
        seconds_per_row: predicted time to receive one key row, in the same unit.
        cluster: whose rates decide, for both passes; None for ``seconds_per_pair`` and ``seconds_per_row``.
        shape: the layer to predict on the cluster.
        random_seed: if given, stages end at random pieces drawn from this seed: uneven stages, for tests.
    """

    degree: int | None = 1
    max_degree: int = 8
    min_piece: int = 512
    max_pieces: int = 64
    seconds_per_pair: float = 1.0
    seconds_per_row: float = 1.0
    cluster: Cluster | None = None
    shape: LayerShape = LayerShape()
    random_seed: int | None = None


def piece_sizes(rows: NDArray[np.int64], options: StageOptions) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For ranks that receive so many rows, the length of their pieces and the number of these."""
    piece = np.maximum(options.min_piece, -(-rows // options.max_pieces))
    return piece, -(-rows // piece)


def cut_stages(demand: Demand, key_layout: Layout, degree: int, options: StageOptions) -> NDArray[np.int64]:
    """Cut every rank's remote rows into ``degree`` runs of nearly equal length, one for each stage.

    Ranks begin with different runs: rows that many ranks read would else leave their owner in a single stage. Ranks of
    a document are neighbors mostly, and so begin with all of them in turn; but neighbors of a node with the same, since
    rows that travel in two hops should cross to the node only once.

    Returns ``(n, 4)`` rows ``(rank, start, stop, stage)``, sorted by rank, then by start.
    """
    rank, start, stop = demand.remote.T
    rows = totals(rank, stop - start, key_layout.num_ranks)
    piece, num_pieces = piece_sizes(rows, options)
    share = np.arange(1, degree + 1) / degree
    if options.random_seed is not None:
        share[:-1] = np.sort(np.random.default_rng(options.random_seed).random(degree - 1))
    ends = np.ceil(num_pieces[:, None] * share).astype(np.int64) * piece[:, None]
    ends = np.minimum(ends, rows[:, None])
    before = np.cumsum(rows) - rows
    pieces, offset = split_at(lift(demand.remote[:, 1:], rank, key_layout), (before[:, None] + ends).ravel())
    located = unlift(pieces, key_layout)
    owner = located[:, 0]
    run = (ends[owner] <= (offset - before[owner])[:, None]).sum(axis=1)
    # Ranks with few rows fill the first stages, so that the last need not be exchanged at all.
    together = max(1, min(NODE, key_layout.num_ranks // degree))
    first = np.where(num_pieces >= degree, np.arange(key_layout.num_ranks) // together % degree, 0)
    return np.column_stack([located, (run + first[owner]) % degree])
