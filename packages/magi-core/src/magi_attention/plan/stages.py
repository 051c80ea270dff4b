# SPDX-License-Identifier: Apache-2.0
"""Cut the rows that travel into overlap stages, and choose how many stages there are."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magi_attention.common.intervals import split_at
from magi_attention.plan.demand import Demand, lift, unlift
from magi_attention.plan.layout import Layout

# A degree that is predicted to gain less than this is not worth its extra kernel launches and merges.
WORTHWHILE_GAIN = 0.01


@dataclass(frozen=True)
class StageOptions:
    """How to cut stages.

    Attributes:
        degree: number of remote stages; 0 for one kernel call over own and received rows; None to choose.
        max_degree: the largest degree to choose.
        min_piece: the fewest rows, but for the last piece, that are moved from one stage to another.
        max_pieces: the most pieces that a rank's remote rows are cut into.
        seconds_per_pair: predicted time to compute one (query, key) pair, in any unit.
        seconds_per_row: predicted time to receive one key row, in the same unit.
        random_seed: if given, stages end at random pieces drawn from this seed: uneven stages, for tests.
    """

    degree: int | None = 1
    max_degree: int = 8
    min_piece: int = 512
    max_pieces: int = 64
    seconds_per_pair: float = 1.0
    seconds_per_row: float = 1.0
    random_seed: int | None = None


def choose_degree(demand: Demand, options: StageOptions) -> int:
    """The smallest degree whose predicted forward time, for the slowest rank, is within 1 % of the best.

    While a stage is computed the next one travels, and the first travels while the own rows are computed. With ``own``
    and ``remote`` the time to compute, ``travel`` the time to receive, and equal stages, degree n takes
    ``max(own, travel/n) + (n - 1) max(remote/n, travel/n) + remote/n``.
    """
    if options.degree is not None:
        return options.degree
    rank, start, stop = demand.remote.T
    rows = np.bincount(rank, weights=stop - start, minlength=len(demand.area))
    own = demand.area_own * options.seconds_per_pair
    remote = (demand.area - demand.area_own) * options.seconds_per_pair
    travel = rows * options.seconds_per_row
    degrees = np.arange(1, options.max_degree + 1)[:, None]
    slowest = (
        np.maximum(own, travel / degrees) + (degrees - 1) * np.maximum(remote, travel) / degrees + remote / degrees
    )
    predicted = slowest.max(axis=1)
    return int(np.flatnonzero(predicted <= predicted.min() * (1 + WORTHWHILE_GAIN))[0]) + 1


def cut_stages(demand: Demand, key_layout: Layout, degree: int, options: StageOptions) -> NDArray[np.int64]:
    """Cut every rank's remote rows into ``degree`` runs of nearly equal length, one for each stage.

    Ranks begin with different runs: rows that many ranks read would else leave their owner in a single stage.

    Returns ``(n, 4)`` rows ``(rank, start, stop, stage)``, sorted by rank, then by start.
    """
    rank, start, stop = demand.remote.T
    rows = np.bincount(rank, weights=stop - start, minlength=key_layout.num_ranks).astype(np.int64)
    piece = np.maximum(options.min_piece, -(-rows // options.max_pieces))
    num_pieces = -(-rows // piece)
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
    first = np.where(num_pieces >= degree, np.arange(key_layout.num_ranks) * degree // key_layout.num_ranks, 0)
    return np.column_stack([located, (run + first[owner]) % degree])
