# SPDX-License-Identifier: Apache-2.0
"""Choose how many overlap stages there are.

For equal stages the timeline of :mod:`plan.simulate` has a closed form. With ``early`` and ``first`` the time to
compute before the first received rows come and with these, ``stage`` that of a later stage, and ``fetch`` that to
receive a stage's rows or to send their gradients home (links carry both directions at once, so both take as long),
n > 1 stages take::

    forward  = max(early, fetch) + max(first, fetch) + (n - 2) max(stage, fetch) + stage
    backward = max(early, fetch) + max(first, fetch) + (n - 2) max(stage, 2 fetch) + max(stage, fetch) + fetch

and one stage::

    forward  = max(early, fetch) + first
    backward = max(early, fetch) + first + fetch

since the first stage's rows travel while ``early`` is computed, every other stage's while the one before is, and
backward a stage's gradients go home on the same link, before the rows of the stage after the next. How much a rank
computes early is its own choice, among ``EARLY_SHARES`` of its own pairs: what it does early must be merged, what it
keeps back hides no travel. In two hops an exchange takes the time of both. There more rows cross in more stages, once
for each stage in which ranks of a node fetch them: their number is taken to grow with a power of n, found by cutting
two stages.

Degree 0, a single kernel that waits for all rows, is degree 1 with nothing computed early, and never chosen.

Stages as they are cut are not equal: one may hold most of what a rank sends. So a few of the degrees that come out well
are cut and simulated.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magi_attention.plan.demand import Demand
from magi_attention.plan.layout import Layout
from magi_attention.plan.rates import BACKWARD_OVER_FORWARD_FLOP, EARLY_SHARES, MERGE_BYTES, TILE, Cluster
from magi_attention.plan.relays import rows_crossing, two_hop_loads
from magi_attention.plan.simulate import predict
from magi_attention.plan.stage_work import count_tiles, measure_stages, real_tokens
from magi_attention.plan.stages import StageOptions, cut_stages, piece_sizes
from magi_attention.plan.totals import totals
from magi_attention.plan.traffic import Table, direct_links

# A degree that is predicted to gain less than this is not worth its extra kernel launches and merges.
WORTHWHILE_GAIN = 0.01
# Of the degrees that would be within this share of the best if stages were equal, SIMULATED from the least to the
# greatest are simulated.
PROMISING, SIMULATED = 0.05, 5

Values = NDArray[np.floating]


def choose_degree(
    demand: Demand,
    layout: Layout,
    key_layout: Layout,
    options: StageOptions,
    mesh_shape: tuple[int, int] | None = None,
) -> int:
    """The given degree or, if that is None, the smallest whose predicted time is within 1 % of the best, at least 1.

    Args:
        demand: what the ranks compute and need.
        layout: who owns which queries.
        key_layout: who owns which keys.
        options: with a ``cluster``, both passes are predicted at its rates, the slowest rank's of each; without, the
            forward pass by ``seconds_per_pair`` and ``seconds_per_row``.
        mesh_shape: ``(nodes, ranks per node)`` of exchanges in two hops; None for direct ones.
    """
    if options.degree is not None:
        return options.degree
    if not len(demand.remote):
        return 1
    if options.cluster is None:
        return _smallest_near_best(_predict_by_factors(demand, options)) + 1
    staged = _predict_layer(demand, layout, key_layout, options, options.cluster, mesh_shape)
    promising = np.flatnonzero(staged <= staged.min() * (1 + PROMISING)) + 1
    promising = promising[np.unique(np.linspace(0, len(promising) - 1, SIMULATED).round().astype(np.int64))]
    seconds = [
        _simulate(demand, layout, key_layout, options, options.cluster, mesh_shape, n) for n in promising.tolist()
    ]
    return int(promising[_smallest_near_best(np.array(seconds))])


def _smallest_near_best(seconds: Values) -> int:
    return int(np.flatnonzero(seconds <= seconds.min() * (1 + WORTHWHILE_GAIN))[0])


def _simulate(
    demand: Demand,
    layout: Layout,
    key_layout: Layout,
    options: StageOptions,
    cluster: Cluster,
    mesh_shape: tuple[int, int] | None,
    degree: int,
) -> float:
    """Both passes with so many stages, as they would be cut."""
    remote = cut_stages(demand, key_layout, degree, options)
    ranks_per_node = cluster.ranks_per_node if mesh_shape is None else mesh_shape[1]
    two_hops = mesh_shape is not None
    work = measure_stages(demand, remote, layout, degree, ranks_per_node, key_layout, two_hops=two_hops)
    return predict(work, cluster, options.shape).seconds


def _predict_by_factors(demand: Demand, options: StageOptions) -> Values:
    """The forward pass with each degree from 1."""
    rank, start, stop = demand.remote.T
    rows = totals(rank, stop - start, len(demand.area))
    n = np.arange(1, options.max_degree + 1)[:, None]
    stage = (demand.area - demand.area_own) * options.seconds_per_pair / n
    stages = _Stages(
        degree=n,
        early=demand.area_own * options.seconds_per_pair,
        first=stage,
        stage=stage,
        fetch=rows * options.seconds_per_row / n,
    )
    return stages.forward().max(axis=1)


def _predict_layer(
    demand: Demand,
    layout: Layout,
    key_layout: Layout,
    options: StageOptions,
    cluster: Cluster,
    mesh_shape: tuple[int, int] | None,
) -> Values:
    """Both passes with each degree from 1."""
    rank, start, stop = demand.remote.T
    rows = totals(rank, stop - start, key_layout.num_ranks)
    _, num_pieces = piece_sizes(rows, options)
    # Further stages than the ranks have pieces would be empty.
    degrees = np.arange(1, min(options.max_degree, int(num_pieces.max())) + 1)
    n = np.minimum(degrees[:, None], np.maximum(num_pieces, 1))
    if mesh_shape is None:
        hops, links, growth = 1, direct_links(demand.remote, key_layout, cluster.ranks_per_node), 0.0
    else:
        hops, links = 2, two_hop_loads(demand.remote, key_layout, mesh_shape[1]).by_rank
        growth = _growth_of_crossing(demand, key_layout, options, mesh_shape[1])
    # Powers differ in their last bits from CPU to CPU, and ranks must choose alike.
    travel = links.busy_seconds(options.shape.bytes_per_row, hops, cluster) * np.round(n**growth, 6)
    exchange_latency, latency = hops * cluster.exchange_latency_us * 1e-6, cluster.kernel_latency_us * 1e-6
    numbers = options.shape.heads_q * options.shape.head_dim
    merge = real_tokens(layout) * (numbers * MERGE_BYTES / (cluster.memory_gbs * 1e9))
    tiles = totals(layout.runs[demand.run, 2], count_tiles(demand.bands), layout.num_ranks)
    tile_pairs = tiles * float(TILE**2)
    own_share = demand.area_own / np.maximum(demand.area, 1)

    fetch = travel / n + exchange_latency
    early_share = np.array(EARLY_SHARES)[:, None, None]

    def stages(compute: Values) -> _Stages:
        own, remote = compute * own_share, compute * (1 - own_share) / n
        return _Stages(
            degree=n,
            early=early_share * own + (early_share > 0) * latency,
            first=(1 - early_share) * own + remote + latency + early_share * merge,
            stage=remote + latency + merge,
            fetch=fetch,
        )

    flop = options.shape.flop_per_pair
    forward = stages(tile_pairs * (flop / (cluster.forward_tflops * 1e12))).forward()
    backward = stages(tile_pairs * (flop * BACKWARD_OVER_FORWARD_FLOP / (cluster.backward_tflops * 1e12))).backward()
    chosen = (forward + backward).argmin(axis=0)[None]
    slowest = [np.take_along_axis(each, chosen, axis=0)[0].max(axis=1) for each in (forward, backward)]
    return slowest[0] + slowest[1]


def _growth_of_crossing(demand: Demand, key_layout: Layout, options: StageOptions, ranks_per_node: int) -> float:
    """The power of the number of stages with which rows crossing to other nodes grow, for the busiest rank."""

    def busiest(stages: Sequence[Table]) -> int:
        crossing = [rows_crossing(each, key_layout, ranks_per_node) for each in stages]
        return int(sum(np.maximum(each.sum(axis=0), each.sum(axis=1)) for each in crossing).max())

    whole = busiest([demand.remote])
    halves = cut_stages(demand, key_layout, 2, options)
    return float(np.log2(busiest([halves[halves[:, 3] == each, :3] for each in range(2)]) / whole)) if whole else 0.0


@dataclass(frozen=True, eq=False)
class _Stages:
    """Seconds of each part, as the top of this module names them; they broadcast to ``([shares,] degrees, ranks)``."""

    degree: NDArray[np.int64]
    early: Values
    first: Values
    stage: Values
    fetch: Values

    def forward(self) -> Values:
        several = np.maximum(self.first, self.fetch) + self.stage
        several = several + (self.degree - 2) * np.maximum(self.stage, self.fetch)
        return np.maximum(self.early, self.fetch) + np.where(self.degree > 1, several, self.first)

    def backward(self) -> Values:
        several = np.maximum(self.first, self.fetch) + np.maximum(self.stage, self.fetch)
        several = several + (self.degree - 2) * np.maximum(self.stage, 2 * self.fetch)
        return np.maximum(self.early, self.fetch) + np.where(self.degree > 1, several, self.first) + self.fetch
