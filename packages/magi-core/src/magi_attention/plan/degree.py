# SPDX-License-Identifier: Apache-2.0
"""Choose how many overlap stages there are.

For equal stages the timeline of :mod:`plan.simulate` has a closed form. With ``own`` and ``stage`` the time to compute
with own rows and with one stage's, and ``fetch`` that to receive a stage's rows or to send their gradients home (links
carry both directions at once, so both take as long), n stages take::

    forward  = max(own, fetch) + (n - 1) max(stage, fetch) + stage
    backward = max(own, fetch) + max(stage, fetch) + (n - 2) max(stage, 2 fetch) + max(stage, fetch) + fetch
    backward = max(own, fetch) + stage + fetch                                                            (for n = 1)

since the first stage's rows travel while the own rows are computed, every other stage's while the one before is, and
backward a stage's gradients go home on the same link, before the rows of the stage after the next. With degree 0 a
single kernel waits for all rows, which are copied behind the own ones: ``fetch + copy + own + stage``, and ``fetch``
once more backward. In two hops an exchange takes the time of both. There more rows cross in more stages, once for each
stage in which ranks of a node fetch them: their number is taken to grow with a power of n, found by cutting two stages.

Stages as they are cut are not equal: one may hold most of what a rank sends. So a few of the degrees that come out well
are cut and simulated.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magi_attention.plan.demand import Demand
from magi_attention.plan.layout import Layout
from magi_attention.plan.rates import BACKWARD_OVER_FORWARD_FLOP, MERGE_BYTES, TILE, Cluster
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
PROMISING, SIMULATED = 0.05, 3

Values = NDArray[np.floating]


def choose_degree(
    demand: Demand,
    layout: Layout,
    key_layout: Layout,
    options: StageOptions,
    mesh_shape: tuple[int, int] | None = None,
) -> int:
    """The given degree or, if that is None, the smallest whose predicted time is within 1 % of the best.

    Degree 0, which hides nothing if the links turn out slower, is chosen only where it is the best by 1 %.

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
    at_once, staged = _predict_layer(demand, layout, key_layout, options, options.cluster, mesh_shape)
    if at_once * (1 + WORTHWHILE_GAIN) < staged.min():
        return 0
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
    stages = _Stages(
        degree=n,
        own=demand.area_own * options.seconds_per_pair,
        stage=(demand.area - demand.area_own) * options.seconds_per_pair / n,
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
) -> tuple[float, Values]:
    """Both passes with degree 0, and with each degree from 1."""
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
    travel = links.busy_seconds(options.shape.bytes_per_row, hops, cluster) * n**growth
    exchange_latency, latency = hops * cluster.exchange_latency_us * 1e-6, cluster.kernel_latency_us * 1e-6
    numbers = options.shape.heads_q * options.shape.head_dim
    merge = real_tokens(layout) * (numbers * MERGE_BYTES / (cluster.memory_gbs * 1e9))
    tiles = totals(layout.runs[demand.run, 2], count_tiles(demand.bands), layout.num_ranks)
    tile_pairs = tiles * float(TILE**2)
    own_share = demand.area_own / np.maximum(demand.area, 1)

    def stages(compute: Values) -> _Stages:
        own, remote = compute * own_share, compute * (1 - own_share)
        return _Stages(n, own + latency, remote / n + latency + merge, travel / n + exchange_latency)

    flop = options.shape.flop_per_pair
    forward = tile_pairs * (flop / (cluster.forward_tflops * 1e12))
    backward = tile_pairs * (flop * BACKWARD_OVER_FORWARD_FLOP / (cluster.backward_tflops * 1e12))
    fetch = travel[0] + exchange_latency
    read_and_written = 2 * (key_layout.rows_per_rank + rows) * options.shape.bytes_per_row
    before_kernel = fetch + read_and_written / (cluster.memory_gbs * 1e9) + latency
    at_once = (before_kernel + forward).max() + (before_kernel + backward + fetch).max()
    staged = stages(forward).forward().max(axis=1) + stages(backward).backward().max(axis=1)
    return float(at_once), staged


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
    """Seconds of each part, as the top of this module names them; arrays that broadcast to ``(degrees, ranks)``."""

    degree: NDArray[np.int64]
    own: Values
    stage: Values
    fetch: Values

    def forward(self) -> Values:
        first = np.maximum(self.own, self.fetch)
        return first + (self.degree - 1) * np.maximum(self.stage, self.fetch) + self.stage

    def backward(self) -> Values:
        either = np.maximum(self.stage, self.fetch)
        several = 2 * either + (self.degree - 2) * np.maximum(self.stage, 2 * self.fetch)
        return np.maximum(self.own, self.fetch) + np.where(self.degree > 1, several, self.stage) + self.fetch
