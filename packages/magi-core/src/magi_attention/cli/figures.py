# SPDX-License-Identifier: Apache-2.0
"""What the ranks of a plan hold, compute and exchange, in numbers that tables and pictures show."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magi_attention.common.slices import SliceTable
from magi_attention.plan.build import Plan, Stage
from magi_attention.plan.exchange import ExchangeTable, TwoHopExchange
from magi_attention.plan.layout import Layout
from magi_attention.plan.rates import Cluster, LayerShape
from magi_attention.plan.simulate import Prediction, StageWork, count_tiles, predict, real_tokens

QUANTILES = {"most": 1.0, "95 %": 0.95, "median": 0.5, "5 %": 0.05, "least": 0.0}
"""What tables and pictures show of many ranks, by its name."""

MOST_SHOWN_RANKS = 16
"""With more ranks than this, tables and pictures show quantiles and the slowest ranks only."""

NUM_SLOWEST = 8


@dataclass(frozen=True, eq=False)
class PlanFigures:
    """A plan of all ranks, measured, with its predicted time.

    Attributes:
        mask: the mask planned for.
        layout: who owns which rows.
        work: what every rank computes and exchanges in every stage.
        prediction: when, on ``cluster``, for heads as in ``shape``.
        cluster: the machines that the prediction assumes.
        shape: the layer that it assumes.
    """

    mask: SliceTable
    layout: Layout
    work: StageWork
    prediction: Prediction
    cluster: Cluster
    shape: LayerShape

    @property
    def num_ranks(self) -> int:
        """Ranks of the group."""
        return self.layout.num_ranks

    @property
    def pairs(self) -> NDArray[np.int64]:
        """``(ranks,)`` (query, key) pairs that each rank computes."""
        return self.work.pairs.sum(axis=1)

    @property
    def received(self) -> NDArray[np.int64]:
        """``(ranks,)`` key/value rows that each rank receives in one layer's forward pass."""
        return self.work.received.sum(axis=1)

    @property
    def sent(self) -> NDArray[np.int64]:
        """``(ranks,)`` key/value rows that each rank sends."""
        return self.work.sent.sum(axis=1)

    @property
    def rows_of_others(self) -> NDArray[np.int64]:
        """``(ranks,)`` rows that other ranks hold: what an all-gather brings to a rank, and a ring passes through."""
        return self.layout.total - self.layout.rows_per_rank

    @property
    def seconds_by_rank(self) -> NDArray[np.float64]:
        """``(ranks,)`` when each rank is done with both passes, if it waits for nobody."""
        return self.prediction.forward.seconds_by_rank + self.prediction.backward.seconds_by_rank

    def ranks_to_show(self) -> list[int]:
        """All ranks if they are few, else the slowest of them, slowest first, the median and the fastest."""
        if self.num_ranks <= MOST_SHOWN_RANKS:
            return list(range(self.num_ranks))
        slowest_first = np.argsort(-self.seconds_by_rank, kind="stable").tolist()
        return [*slowest_first[:NUM_SLOWEST], slowest_first[self.num_ranks // 2], slowest_first[-1]]

    def names_of_ranks_to_show(self) -> list[str]:
        """What to call each of :meth:`ranks_to_show`."""
        ranks = self.ranks_to_show()
        names = [f"rank {rank}" for rank in ranks]
        if len(ranks) < self.num_ranks:
            names[-2:] = [f"median, {ranks[-2]}", f"fastest, {ranks[-1]}"]
        return names

    @property
    def assumptions(self) -> str:
        """What the predicted time assumes, in one line."""
        cluster, shape = self.cluster, self.shape
        links = f"{cluster.nvlink_gbs:g} GB/s in a node"
        if self.num_ranks > cluster.ranks_per_node:
            links += f" of {cluster.ranks_per_node}, {cluster.link_gbs:g} GB/s between nodes"
        return (
            f"{shape.heads_q} query and {shape.heads_kv} key/value heads of {shape.head_dim}, kernels of "
            f"{cluster.forward_tflops:g} and {cluster.backward_tflops:g} Tflop/s, {links}"
        )

    @property
    def imbalance(self) -> float:
        """The most pairs that a rank computes, relative to the mean: 1 is perfect."""
        return imbalance(self.pairs)


def imbalance(pairs: NDArray[np.int64]) -> float:
    """Return the largest over the mean; 1 where there is nothing to compute."""
    return float(pairs.max() * len(pairs) / pairs.sum()) if pairs.any() else 1.0


def short(number: float) -> str:
    """Write a number with three digits and a suffix for thousands, millions, billions or trillions."""
    for unit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{suffix}"
    return f"{number:.3g}"


def time_unit(seconds: float) -> tuple[float, str]:
    """Return what to multiply seconds with to show about ``seconds`` of them, and the unit's name."""
    for factor, name in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return factor, name
    return 1e6, "µs"


def saved_share(received: float, of_others: float) -> float:
    """Which share of the rows that an all-gather or a ring moves stays at home."""
    return 1 - received / of_others if of_others else 0.0


def figures_of_plans(mask: SliceTable, plans: Sequence[Plan], cluster: Cluster, shape: LayerShape) -> PlanFigures:
    """Measure plans that exist, those of all ranks in their order."""
    work = work_of_plans(plans)
    return PlanFigures(mask, plans[0].layout, work, predict(work, cluster, shape), cluster, shape)


def work_of_plans(plans: Sequence[Plan]) -> StageWork:
    """Measure the stages of plans with direct exchanges, as if all ranks shared one node."""
    tables = [[_direct(stage, len(plans)) for stage in plan.stages] for plan in plans]
    received = np.array([[table.num_received for table in row] for row in tables])
    return StageWork(
        tokens=real_tokens(plans[0].layout),
        pairs=np.array([[stage.slices.area() for stage in plan.stages] for plan in plans]),
        tiles=np.array([[count_tiles(stage.slices.bands()).sum() for stage in plan.stages] for plan in plans]),
        received=received,
        sent=np.array([[sum(table.send_counts) for table in row] for row in tables]),
        received_inter=np.zeros_like(received),
        sent_inter=np.zeros_like(received),
        traffic=np.array([np.sum([table.recv_counts for table in row], axis=0) for row in tables]),
    )


def _direct(stage: Stage, num_ranks: int) -> ExchangeTable:
    """The stage's exchange, an empty one where there is none."""
    if stage.exchange is None:
        nothing = np.empty((0, 3), np.int64)
        return ExchangeTable(nothing, nothing, num_ranks, 0, 0)
    if isinstance(stage.exchange, TwoHopExchange):
        raise ValueError("exchanges in two hops cannot be drawn; plan direct ones")
    return stage.exchange
