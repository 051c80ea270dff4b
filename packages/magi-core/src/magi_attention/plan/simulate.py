# SPDX-License-Identifier: Apache-2.0
"""Predict how long one attention layer takes on a cluster, from the plan of all its ranks.

The model, for a rank, a stage and one pass (symbols are fields of :class:`~plan.rates.Cluster` and
:class:`~plan.rates.LayerShape`)::

    compute = kernel_latency + tiles * TILE² * flop_per_pair / flop_rate + merge
    merge   = share * tokens * heads_q * head_dim * MERGE_BYTES / memory_rate       (for a second and later partial)
    travel  = exchange_latency + bytes_per_row * max(intra / nvlink_rate, inter / link_rate)
    travel  = 2 * exchange_latency + bytes_per_row * (inter / link_rate + intra / nvlink_rate)       (in two hops)

``flop_per_pair`` is ``4 * heads_q * head_dim`` forward (two matrix products of a multiplication and an addition each)
and 2.5 times as many backward (five products). ``intra`` and ``inter`` are the rows that the rank exchanges with its
own node and with others, the larger of received and sent, since links carry both directions at once, and the two kinds
of links work side by side. A row is a key and its value, ``2 * heads_kv * head_dim * bytes_per_number`` bytes.

In two hops (hierarchical communication) a row crosses to each node that misses it once, to a relay, and is spread
within the node thereafter: ``inter`` counts the rows that cross, ``intra`` those of the second hop, which waits for the
first. So the times add up, and each hop has its latency.

Where queries travel, a row is a query: forward, q goes out and out and lse come home; backward, q, the gradient of out,
lse and one more number per head go out and the gradient of q comes home (:attr:`LayerShape.bytes_of_query_row`). The
kernel runs where the keys are, and the owner of the queries merges what comes home once it has arrived: that takes
another ``merge``, which counts as travel.

Of its own pairs, a rank may compute a share (one of ``EARLY_SHARES``) before the first received rows come, and the rest
in one kernel with these, so that only the share's partial results must be merged: all of them hides the most travel,
none needs no merge. For later stages ``share`` is 1. Each rank takes the share with the least time of both passes. The
runtime decides in the same way, but knows which queries need received rows at all, and keeps these back.

Stages follow one another as in the runtime. One exchange travels at a time on a rank: a stage's rows after those of the
stage before, and not before the kernel two stages earlier is done. The backward pass fetches the rows again and sends
each stage's gradients of keys and values home after its kernel, sent and received swapped. A pass ends with its slowest
rank; within it, no rank waits for another. Left out: everything but the attention, contention in switches, the slowing
down of kernels by communication, and rows that the runtime keeps for the backward pass instead of fetching them again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magi_attention.plan.rates import (
    BACKWARD_OVER_FORWARD_FLOP,
    EARLY_SHARES,
    MERGE_BYTES,
    TILE,
    Cluster,
    LayerShape,
)
from magi_attention.plan.stage_work import StageWork

Seconds = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class PassTimeline:
    """When the stages of one pass run, in seconds from its start; each ``(ranks, stages, 2)``: starts and stops.

    Attributes:
        fetch: the stage's rows travel.
        compute: the stage's kernel runs.
        send_home: gradients of received rows travel or, forward, outputs of visiting queries; else of no length.
    """

    fetch: Seconds
    compute: Seconds
    send_home: Seconds

    @property
    def tables(self) -> tuple[Seconds, Seconds, Seconds]:
        """All three."""
        return self.fetch, self.compute, self.send_home

    @property
    def seconds_by_rank(self) -> Seconds:
        """``(ranks,)`` when each rank is done."""
        return np.max([table[..., 1] for table in self.tables], axis=(0, 2))

    @property
    def seconds(self) -> float:
        """When the slowest rank is done."""
        return float(self.seconds_by_rank.max())


@dataclass(frozen=True, eq=False)
class Prediction:
    """The predicted time of one attention layer.

    Attributes:
        forward: the forward pass.
        backward: the backward pass.
        ideal_seconds: both passes, if the pairs were dealt evenly, kernels ran at their full rate and nothing else took
            time.
    """

    forward: PassTimeline
    backward: PassTimeline
    ideal_seconds: float

    @property
    def seconds(self) -> float:
        """Both passes, each as long as its slowest rank."""
        return self.forward.seconds + self.backward.seconds

    @property
    def efficiency(self) -> float:
        """Ideal over predicted time, at most 1."""
        return self.ideal_seconds / self.seconds


def predict(work: StageWork, cluster: Cluster, shape: LayerShape) -> Prediction:
    """Predict both passes by the model at the top of this module."""
    forward_flop = shape.flop_per_pair
    backward_flop = forward_flop * BACKWARD_OVER_FORWARD_FLOP
    merge = work.tokens * (shape.heads_q * shape.head_dim * MERGE_BYTES / (cluster.memory_gbs * 1e9))
    tile_pairs = work.tiles * float(TILE**2)
    forward, backward = (
        _compute_by_share(work, tile_pairs * seconds, merge, cluster.kernel_latency_us * 1e-6)
        for seconds in (
            forward_flop / (cluster.forward_tflops * 1e12),
            backward_flop / (cluster.backward_tflops * 1e12),
        )
    )
    travel = [
        _travel_seconds(work, cluster, *each)
        for each in zip(shape.bytes_of_key_row, shape.bytes_of_query_row, strict=True)
    ]
    out_forward, home_forward, out_backward, home_backward = travel
    comes_home = work.queries_travel & (work.received.sum(axis=0) > 0)
    merge_visitors = merge[:, None] * comes_home
    timelines = (
        _walk_all(out_forward, forward, home_forward + merge_visitors),
        _walk_all(out_backward, backward, home_backward + merge_visitors),
    )
    best = np.sum([[each.seconds_by_rank for each in of_pass] for of_pass in timelines], axis=0).argmin(axis=0)
    mean_pairs = work.pairs.sum() / len(work.pairs)
    return Prediction(
        forward=_take_by_rank(timelines[0], best),
        backward=_take_by_rank(timelines[1], best),
        ideal_seconds=float(
            mean_pairs * (forward_flop / cluster.forward_tflops + backward_flop / cluster.backward_tflops) / 1e12
        ),
    )


def _compute_by_share(
    work: StageWork, kernels: NDArray[np.floating], merge: NDArray[np.floating], latency: float
) -> list[Seconds]:
    """What each stage's kernel and merge take, ``(ranks, stages)``, with each early share that can be.

    Args:
        work: what is computed.
        kernels: the kernels alone.
        merge: ``(ranks,)`` to merge all of a rank's partial results.
        latency: of a kernel.
    """
    is_partial = (work.pairs > 0) & ~work.queries_travel
    merges = merge[:, None] * (is_partial & (np.cumsum(is_partial, axis=1) > 1))
    apart = np.where(work.pairs > 0, latency, 0.0) + kernels + merges
    # Where queries travel, and where there is no later stage, all is computed as planned.
    if work.queries_travel.any() or kernels.shape[1] == 1:
        return [apart]
    computed = [apart]
    for share in EARLY_SHARES[1:]:
        later = (1 - share) * kernels[:, 0] + kernels[:, 1]
        arranged = apart.copy()
        arranged[:, 0] = share * kernels[:, 0] + latency * ((share > 0) & (work.pairs[:, 0] > 0))
        arranged[:, 1] = later + latency * (later > 0) + share * merges[:, 1]
        computed.append(arranged)
    return computed


def _walk_all(fetch: Seconds, compute: Sequence[Seconds], send_home: Seconds) -> list[PassTimeline]:
    """The timeline of each arrangement of the kernels."""
    num_ranks, num = len(fetch), len(compute)
    whole = _walk(np.tile(fetch, (num, 1)), np.concatenate(compute), np.tile(send_home, (num, 1)))
    parts = (np.split(table, range(num_ranks, num * num_ranks, num_ranks)) for table in whole.tables)
    return [PassTimeline(*tables) for tables in zip(*parts, strict=True)]


def _take_by_rank(timelines: Sequence[PassTimeline], chosen: NDArray[np.int64]) -> PassTimeline:
    """Each rank's part of the timeline that is chosen for it."""
    ranks = np.arange(len(chosen))
    return PassTimeline(
        *(np.stack(tables)[chosen, ranks] for tables in zip(*(each.tables for each in timelines), strict=True))
    )


def _travel_seconds(work: StageWork, cluster: Cluster, bytes_of_keys: int, bytes_of_queries: int) -> Seconds:
    """``(ranks, stages)`` time that each stage's exchange keeps a rank's links busy, in either direction."""
    row = np.where(work.queries_travel, bytes_of_queries, bytes_of_keys)
    # A collective concerns all ranks, even those that exchange nothing in it.
    takes_place = (row > 0) & (work.received.sum(axis=0) > 0)
    return (
        work.links.busy_seconds(row, work.hops, cluster) + work.hops * takes_place * cluster.exchange_latency_us * 1e-6
    )


def _walk(fetch: Seconds, compute: Seconds, send_home: Seconds) -> PassTimeline:
    """Run all ranks' stages, in the order in which the runtime puts exchanges on the link."""
    num_ranks, num_stages = fetch.shape
    timeline = PassTimeline(*(np.zeros((num_ranks, num_stages, 2)) for _ in range(3)))
    link = done = np.zeros(num_ranks)

    def occupy(table: Seconds, stage: int, length: Seconds, ready: Seconds) -> None:
        nonlocal link
        start = np.where(length > 0, np.maximum(link, ready), link)
        link = start + length
        table[:, stage] = np.column_stack([start, link])

    occupy(timeline.fetch, 0, fetch[:, 0], done)
    for stage in range(num_stages):
        # `done` is when the kernel before this stage's is: it was launched before what follows was put on the link.
        if stage:
            occupy(timeline.send_home, stage - 1, send_home[:, stage - 1], done)
        if stage + 1 < num_stages:
            occupy(timeline.fetch, stage + 1, fetch[:, stage + 1], done)
        start = np.maximum(done, timeline.fetch[:, stage, 1])
        done = start + compute[:, stage]
        timeline.compute[:, stage] = np.column_stack([start, done])
    occupy(timeline.send_home, num_stages - 1, send_home[:, -1], done)
    return timeline
