# SPDX-License-Identifier: Apache-2.0
"""Plan a mask for all ranks of a group, measure the plan, and measure beside it what others would do."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from magi_attention.api.checks import resolve_chunk_size
from magi_attention.cli.figures import PlanFigures, imbalance
from magi_attention.cli.plan.masks import NamedMask
from magi_attention.cli.plan.options import PlanOptions
from magi_attention.common.enum import DispatchAlgType
from magi_attention.config import DispatchAlg, DispatchConfig, MinHeapDispatchAlg
from magi_attention.plan.bounds import received_lower_bound
from magi_attention.plan.degree import choose_degree
from magi_attention.plan.demand import Demand, find_demand
from magi_attention.plan.dispatch import make_layout
from magi_attention.plan.layout import Layout
from magi_attention.plan.rates import Cluster, LayerShape, Rates
from magi_attention.plan.simulate import measure_stages, predict
from magi_attention.plan.stages import StageOptions, cut_stages
from magi_attention.runtime.rates_file import newest_rates_path, read_rates

BACKWARD_SHARE = 5 / 6
"""Rate of backward kernels over that of forward kernels; about what FlashAttention reaches on H100."""

BOUND_TOLERANCE = 0.02
"""How far the busiest rank may exceed the mean in the deals that the lower bound holds for."""

MEASURED = "measured"
"""What ``--rates`` takes instead of a file."""

SIMULATED_DEGREES = (0, 1, 2, 3, 4, 6, 8)


@dataclass(frozen=True)
class Baseline:
    """How else the same mask could be spread over as many ranks.

    Attributes:
        name: what is done.
        rows_received: key/value rows that all ranks receive together, per layer.
        imbalance: the most pairs that a rank computes over the mean.
    """

    name: str
    rows_received: int
    imbalance: float


class PlanStudy:
    """The plan of one mask, its measures, and what it is compared with.

    Attributes:
        options: what was asked for.
        mask: the mask.
        dispatch: how chunks are dealt.
        layout: who owns which rows.
        demand: what the ranks compute and need.
        cluster: the machines that predictions assume.
        shape: the layer that they assume.
        degree: remote stages, chosen if the options leave it open.
    """

    def __init__(self, options: PlanOptions, mask: NamedMask) -> None:
        self.options, self.mask = options, mask
        self.dispatch = DispatchConfig(options.chunk_size, options.uneven, find_algorithm(options.algorithm))
        self.layout = self._deal(self.dispatch.alg)
        self.demand = find_demand(mask.slices, self.layout)
        self.cluster = find_cluster(options)
        self.shape = LayerShape(options.heads_q, options.heads_kv, options.head_dim)
        self.degree = choose_degree(self.demand, self.layout, self.layout, self._stage_options(options.overlap_degree))

    def _deal(self, algorithm: DispatchAlg) -> Layout:
        tokens, ranks = self.mask.tokens, self.options.ranks
        chunk_size = resolve_chunk_size(tokens, ranks, self.dispatch.chunk_size, algorithm)
        return make_layout(
            self.mask.slices,
            num_real=tokens,
            total=tokens if self.dispatch.uneven_shard else -(-tokens // (chunk_size * ranks)) * chunk_size * ranks,
            chunk_size=chunk_size,
            num_ranks=ranks,
            algorithm=algorithm,
        )

    def _stage_options(self, degree: int | None) -> StageOptions:
        return StageOptions(degree=degree, cluster=self.cluster, shape=self.shape)

    def figures_at(self, degree: int) -> PlanFigures:
        """Measure the plan with a given overlap degree."""
        remote = cut_stages(self.demand, self.layout, max(degree, 1), self._stage_options(degree))
        work = measure_stages(self.demand, remote, self.layout, degree, self.cluster.ranks_per_node)
        prediction = predict(work, self.cluster, self.shape)
        return PlanFigures(self.mask.slices, self.layout, work, prediction, self.cluster, self.shape)

    @cached_property
    def figures(self) -> PlanFigures:
        """Measures of the plan with its own degree."""
        return self.figures_at(self.degree)

    @cached_property
    def simulation(self) -> dict[int, PlanFigures]:
        """Measures by overlap degree, if asked for."""
        if not self.options.simulate:
            return {}
        return {degree: self.figures_at(degree) for degree in sorted({*SIMULATED_DEGREES, self.degree})}

    @cached_property
    def lower_bound(self) -> int | None:
        """Rows that any deal of equally many rows and nearly equal work makes the ranks receive; None if uneven."""
        if self.dispatch.uneven_shard:
            return None
        return received_lower_bound(self.mask.slices, self.layout.total, self.options.ranks, BOUND_TOLERANCE)

    @cached_property
    def baselines(self) -> dict[str, Baseline]:
        """What all-gather, ring and the minimum heap would do with this mask."""
        zigzag = _find_demand_of_zigzag(self.mask, self.options.ranks)
        heap = find_demand(self.mask.slices, self._deal(MinHeapDispatchAlg()))
        everything = self.mask.tokens * (self.options.ranks - 1)
        return {
            "all_gather": Baseline("all-gather, zigzag shards", everything, imbalance(zigzag.area)),
            "ring": Baseline("ring, zigzag shards", everything, imbalance(zigzag.area)),
            "min_heap": Baseline("greedy heap (MinHeapDispatchAlg)", _num_rows(heap), imbalance(heap.area)),
        }


def find_cluster(options: PlanOptions) -> Cluster:
    """The machines to predict for: measured or default rates, with what is given beside.

    Raises:
        ValueError: there is no such file of rates, or it holds something else.
    """
    path = None if options.rates is None else Path(options.rates)
    if options.rates == MEASURED:
        path = newest_rates_path()
        if path is None:
            raise ValueError(f"--rates {MEASURED}: nothing was measured on this machine yet; run magi calibrate")
    try:
        rates = Rates() if path is None else read_rates(path)
    except OSError as error:
        raise ValueError(f"--rates {options.rates}: {error.strerror or error}") from None
    given = {"link_gbs": options.link, "nvlink_gbs": options.nvlink, "forward_tflops": options.tflops}
    if options.tflops is not None:
        given["backward_tflops"] = options.tflops * BACKWARD_SHARE
    changed = {name: value for name, value in given.items() if value is not None}
    return Cluster.of_nodes(replace(rates, **changed), options.ranks_per_node)


def find_algorithm(name: str | None) -> DispatchAlg:
    """Return the dispatch algorithm ``name``, as in :class:`DispatchAlgType`; the default for None."""
    if name is None:
        return DispatchConfig().alg
    known = {kind.value: kind for kind in DispatchAlgType}
    kind = known.get(name.replace("-", "_"))
    found = [algorithm for algorithm in _descendants(DispatchAlg) if getattr(algorithm, "type", None) is kind]
    if kind is None or not found:
        raise ValueError(f"--algorithm {name} is none of {', '.join(sorted(each.replace('_', '-') for each in known))}")
    return found[0]()


def _descendants(algorithm: type[DispatchAlg]) -> list[type[DispatchAlg]]:
    return [each for child in algorithm.__subclasses__() for each in (child, *_descendants(child))]


def _find_demand_of_zigzag(mask: NamedMask, num_ranks: int) -> Demand:
    """Shards of two chunks, the n-th from the front and the n-th from the back: even for a causal mask."""
    chunk = -(-mask.tokens // (2 * num_ranks))
    owner = np.concatenate([np.arange(num_ranks), np.arange(num_ranks)[::-1]])
    return find_demand(mask.slices, Layout(mask.tokens, chunk * 2 * num_ranks, chunk, num_ranks, owner))


def _num_rows(demand: Demand) -> int:
    return int((demand.remote[:, 2] - demand.remote[:, 1]).sum())
