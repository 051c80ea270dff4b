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
from magi_attention.config import DispatchAlg, DispatchConfig, LocalityDispatchAlg, MinHeapDispatchAlg
from magi_attention.plan.bounds import received_lower_bound
from magi_attention.plan.build import build_plans
from magi_attention.plan.degree import choose_degree
from magi_attention.plan.demand import Demand, find_demand
from magi_attention.plan.dispatch import make_layout
from magi_attention.plan.key_dispatch import make_key_layout
from magi_attention.plan.layout import Layout
from magi_attention.plan.measure_plans import work_of_plans
from magi_attention.plan.qo import RowCosts
from magi_attention.plan.rates import Cluster, LayerShape, Rates
from magi_attention.plan.simulate import predict
from magi_attention.plan.stage_work import StageWork, measure_stages
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
        layout: who owns which rows, or queries.
        key_layout: who owns which keys; the same object in self-attention.
        demand: what the ranks compute and need.
        cluster: the machines that predictions assume.
        shape: the layer that they assume.
        degree: remote stages, chosen if the options leave it open.
    """

    def __init__(self, options: PlanOptions, mask: NamedMask) -> None:
        self.options, self.mask = options, mask
        self.dispatch = DispatchConfig(options.chunk_size, options.uneven, find_algorithm(options.algorithm))
        self.layout, self.key_layout = self._deal(self.dispatch.alg)
        self.demand = find_demand(mask.slices, self.layout, self.key_layout)
        self.cluster = find_cluster(options)
        self.shape = LayerShape(options.heads_q, options.heads_kv, options.head_dim)
        per_node = self.cluster.ranks_per_node
        mesh_shape = (options.ranks // per_node, per_node) if options.hierarchical else None
        stages = self._stage_options(options.overlap_degree)
        self.degree = choose_degree(self.demand, self.layout, self.key_layout, stages, mesh_shape)

    def _deal(self, algorithm: DispatchAlg) -> tuple[Layout, Layout]:
        """The layouts of queries and of keys."""
        mask, tokens_k = self.mask, self.mask.tokens_k
        total, chunk_size = self._cut(mask.tokens, algorithm)
        total_k, chunk_size_k = self._cut(mask.num_keys, algorithm)

        def deal_keys(layout: Layout) -> Layout:
            return make_key_layout(
                mask.slices,
                layout,
                num_real=mask.num_keys,
                total=total_k,
                chunk_size=chunk_size_k,
                is_permutable=True,
            )

        layout = make_layout(
            mask.slices,
            num_real=mask.tokens,
            total=total,
            chunk_size=chunk_size,
            num_ranks=self.options.ranks,
            algorithm=algorithm,
            deal_keys=None if tokens_k is None else deal_keys,
            is_even=self.dispatch.chunk_size is not None,
        )
        return layout, layout if tokens_k is None else deal_keys(layout)

    def _cut(self, tokens: int, algorithm: DispatchAlg) -> tuple[int, int]:
        """The rows of a sequence, padding included, and of its chunks."""
        chunk_size = resolve_chunk_size(tokens, self.options.ranks, self.dispatch.chunk_size, algorithm)
        unit = 1 if self.dispatch.uneven_shard else chunk_size * self.options.ranks
        return -(-tokens // unit) * unit, chunk_size

    def _stage_options(self, degree: int | None) -> StageOptions:
        return StageOptions(degree=degree, cluster=self.cluster, shape=self.shape)

    def figures_at(self, degree: int) -> PlanFigures:
        """Measure the plan with a given overlap degree."""
        work = self._work_both_ways() if self.options.qo else self._work_at(degree)
        prediction = predict(work, self.cluster, self.shape)
        return PlanFigures(self.mask.slices, self.layout, self.key_layout, work, prediction, self.cluster, self.shape)

    def _work_at(self, degree: int) -> StageWork:
        remote = cut_stages(self.demand, self.key_layout, max(degree, 1), self._stage_options(degree))
        per_node, two_hops = self.cluster.ranks_per_node, self.options.hierarchical
        return measure_stages(self.demand, remote, self.layout, degree, per_node, self.key_layout, two_hops=two_hops)

    def _work_both_ways(self) -> StageWork:
        """Who sends queries to whom is found rank by rank, from the plans of all."""
        costs = RowCosts.of_heads(self.shape.heads_q, self.shape.heads_kv, self.shape.head_dim)
        ranks = range(self.options.ranks)
        plans = build_plans(self.mask.slices, self.layout, ranks, row_costs=costs, key_layout=self.key_layout)
        return work_of_plans(plans, self.cluster.ranks_per_node)

    @cached_property
    def figures(self) -> PlanFigures:
        """Measures of the plan with its own degree."""
        return self.figures_at(self.degree)

    @cached_property
    def simulation(self) -> dict[int, PlanFigures]:
        """Measures by overlap degree, if asked for; where queries travel there is but one."""
        if not self.options.simulate:
            return {}
        if self.options.qo:
            return {self.degree: self.figures}
        return {degree: self.figures_at(degree) for degree in sorted({*SIMULATED_DEGREES, self.degree})}

    @cached_property
    def lower_bound(self) -> int | None:
        """Rows that any deal of equally many rows and nearly equal work makes the ranks receive; None if uneven."""
        if self.dispatch.uneven_shard:
            return None
        total_keys = None if self.mask.tokens_k is None else self.key_layout.total
        return received_lower_bound(
            self.mask.slices, self.layout.total, self.options.ranks, BOUND_TOLERANCE, total_keys
        )

    @cached_property
    def is_heap_deal(self) -> bool:
        """Whether the default algorithm left the chunks to the minimum heap, as it does where that comes out better."""
        is_locality = isinstance(self.dispatch.alg, LocalityDispatchAlg) and self.options.ranks > 1
        if not is_locality or self.layout.uneven_cuts is not None:
            return False
        heap = make_layout(
            self.mask.slices,
            num_real=self.mask.tokens,
            total=self.layout.total,
            chunk_size=self.layout.chunk_size,
            num_ranks=self.options.ranks,
            algorithm=MinHeapDispatchAlg(),
        )
        return np.array_equal(heap.owner, self.layout.owner)

    @property
    def rows_needed(self) -> int:
        """Key/value rows that all ranks read and do not own, in one layer's forward pass."""
        return self.demand.rows_received

    @cached_property
    def baselines(self) -> dict[str, Baseline]:
        """What all-gather, ring and the minimum heap would do with this mask."""
        zigzag = _find_demand_of_zigzag(self.mask, self.options.ranks)
        heap = find_demand(self.mask.slices, *self._deal(MinHeapDispatchAlg()))
        everything = self.mask.num_keys * (self.options.ranks - 1)
        return {
            "all_gather": Baseline("all-gather, zigzag shards", everything, imbalance(zigzag.area)),
            "ring": Baseline("ring, zigzag shards", everything, imbalance(zigzag.area)),
            "min_heap": Baseline("greedy heap (MinHeapDispatchAlg)", heap.rows_received, imbalance(heap.area)),
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
    owner = np.concatenate([np.arange(num_ranks), np.arange(num_ranks)[::-1]])
    chunks = [-(-tokens // (2 * num_ranks)) for tokens in (mask.tokens, mask.num_keys)]
    layout, keys = (Layout(chunk * 2 * num_ranks, chunk * 2 * num_ranks, chunk, num_ranks, owner) for chunk in chunks)
    return find_demand(mask.slices, layout, keys)
