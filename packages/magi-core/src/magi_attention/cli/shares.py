# SPDX-License-Identifier: Apache-2.0
"""What each rank of a plan holds, computes and receives, in numbers that tables and pictures show."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from magi_attention.plan.build import Plan


@dataclass(frozen=True)
class RankShare:
    """One rank's part of an attention, forward, for one layer.

    Attributes:
        rank: the rank.
        tokens: real tokens whose queries, keys and values it holds.
        pairs: (query, key) pairs that it computes.
        rows_received: key/value rows that it receives from other ranks.
        rows_of_others: all rows of the (padded) sequence that other ranks hold: what an all-gather brings to
            every rank, and what a ring passes through it.
    """

    rank: int
    tokens: int
    pairs: int
    rows_received: int
    rows_of_others: int


def share_of(plan: Plan) -> RankShare:
    """Count one rank's share."""
    layout = plan.layout
    start, stop, _ = np.minimum(layout.runs_of(plan.rank), layout.num_real).T
    return RankShare(
        rank=plan.rank,
        tokens=int((stop - start).sum()),
        pairs=sum(stage.slices.area() for stage in plan.stages),
        rows_received=sum(stage.num_received for stage in plan.stages),
        rows_of_others=layout.total - int(layout.rows_per_rank[plan.rank]),
    )


def imbalance(shares: Sequence[RankShare]) -> float:
    """Return the most pairs that a rank computes, relative to the mean: 1 is perfect."""
    pairs = [share.pairs for share in shares]
    return max(pairs) * len(pairs) / sum(pairs)


@dataclass(frozen=True)
class StageTiming:
    """When a stage's rows travel and when it is computed, in pairs: the time to compute one pair is 1.

    Attributes:
        rows: key/value rows received for the stage.
        pairs: pairs computed in it.
        receive_start: when the rows begin to travel.
        receive_stop: when they are there.
        compute_start: when the kernel starts.
        compute_stop: when it is done.
    """

    rows: int
    pairs: int
    receive_start: float
    receive_stop: float
    compute_start: float
    compute_stop: float


def predict_timeline(plan: Plan, pairs_per_row: float) -> list[StageTiming]:
    """Predict when a rank's stages run, if nobody waits for other ranks.

    A stage's rows start to travel when the stage before it starts to compute, and after the rows before them.

    Args:
        plan: one rank's plan.
        pairs_per_row: how many pairs are computed in the time in which one row is received.
    """
    timings: list[StageTiming] = []
    received = computed = previous_start = 0.0
    for stage in plan.stages:
        pairs = stage.slices.area()
        receive_start = max(received, previous_start)
        received = receive_start + stage.num_received * pairs_per_row
        previous_start = max(computed, received) if stage.num_received else computed
        computed = previous_start + pairs
        timings.append(StageTiming(stage.num_received, pairs, receive_start, received, previous_start, computed))
    return timings
