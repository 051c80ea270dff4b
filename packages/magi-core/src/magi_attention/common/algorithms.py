# SPDX-License-Identifier: Apache-2.0
"""Names and parameters of the algorithms that deal chunks to ranks, and remote rows to overlap stages."""

from dataclasses import dataclass
from typing import ClassVar

from magi_attention.common.enum import DispatchAlgType, OverlapAlgType
from magi_attention.common.errors import MagiValueError
from magi_attention.common.validation import check_positive, check_share, check_type


@dataclass(frozen=True)
class DispatchAlg:
    """How chunks, weighted by the pairs that the mask keeps of them, are dealt to ranks. Use one of the subclasses.

    Whatever the algorithm, every rank gets equally many chunks where the shard is even.

    Attributes:
        type: the algorithm's name.
        is_optimal: whether the largest load is the least possible one without a bound on the number of chunks.
        is_partitions_returned: whether the algorithm as published names each rank's chunks, not just the largest load.
        is_equal_num_workloads: whether it needs equally many chunks per rank, and thus an even shard.
        is_affinity_considered: whether it looks at the keys that the chunks of a rank have in common.
    """

    type: ClassVar[DispatchAlgType]
    is_optimal: ClassVar[bool] = False
    is_partitions_returned: ClassVar[bool] = True
    is_equal_num_workloads: ClassVar[bool] = False
    is_affinity_considered: ClassVar[bool] = False


@dataclass(frozen=True)
class LocalityDispatchAlg(DispatchAlg):
    """Documents stay whole where they fit and are split over few ranks where not: balanced, and few rows travel."""

    type = DispatchAlgType.LOCALITY
    is_affinity_considered = True


@dataclass(frozen=True)
class MinHeapDispatchAlg(DispatchAlg):
    """The heaviest chunk left goes to the lightest rank that still takes one."""

    type = DispatchAlgType.MIN_HEAP


@dataclass(frozen=True)
class ToppHeapDispatchAlg(DispatchAlg):
    """As :class:`MinHeapDispatchAlg`, but among the lightest ranks the one that has most keys in common with the chunk.

    Attributes:
        top_p: the share of ranks, in [0, 1], that count as the lightest; at least one rank does.
    """

    type = DispatchAlgType.TOPP_HEAP
    is_equal_num_workloads = True
    is_affinity_considered = True
    top_p: float = 0.0

    def __post_init__(self) -> None:
        check_share(self, "top_p")


@dataclass(frozen=True)
class BatchToppHeapDispatchAlg(ToppHeapDispatchAlg):
    """The same as :class:`ToppHeapDispatchAlg`, by another name.

    Attributes:
        num_of_select_chunk: accepted for compatibility; chunks are chosen one by one.
    """

    type = DispatchAlgType.BATCH_TOPP_HEAP
    num_of_select_chunk: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, ["num_of_select_chunk"], int)


@dataclass(frozen=True)
class SequentialDispatchAlg(DispatchAlg):
    """Runs of neighboring chunks, as equal in number as possible."""

    type = DispatchAlgType.SEQUENTIAL_SELECT


@dataclass(frozen=True)
class SortedSequentialSelectAlg(DispatchAlg):
    """Slices by descending area; each one's chunks, last first, fill the lightest rank.

    Attributes:
        allocation_ratio: the share of its chunks, in (0, 1], that a rank gets before the next rank's turn.
    """

    type = DispatchAlgType.SORTED_SEQUENTIAL_SELECT
    is_equal_num_workloads = True
    allocation_ratio: float = 1.0

    def __post_init__(self) -> None:
        check_share(self, "allocation_ratio")
        check_positive(self, ["allocation_ratio"], int, float)


@dataclass(frozen=True)
class LBDispatchAlg(DispatchAlg):
    """The lower bound of the largest load: the mean, or the heaviest chunk."""

    type = DispatchAlgType.LOWER_BOUND
    is_partitions_returned = False


@dataclass(frozen=True)
class DPDispatchAlg(DispatchAlg):
    """The least largest load by dynamic programming; for few chunks."""

    type = DispatchAlgType.DYNAMIC_PROGRAMMING
    is_optimal = True
    is_partitions_returned = False


@dataclass(frozen=True)
class BSDispatchAlg(DispatchAlg):
    """The least largest load by binary search with backtracking; for few chunks."""

    type = DispatchAlgType.BINARY_SEARCH
    is_optimal = True


@dataclass(frozen=True)
class BTPDispatchAlg(DispatchAlg):
    """The least largest load by backtracking with pruning; for few chunks."""

    type = DispatchAlgType.BACKTRACKING_PRUNING
    is_optimal = True
    is_equal_num_workloads = True


@dataclass(frozen=True)
class RandomSelectDispatchAlg(DispatchAlg):
    """Chunks dealt at random, the same way on every rank."""

    type = DispatchAlgType.RANDOM_SELECT
    is_equal_num_workloads = True


@dataclass(frozen=True)
class OverlapAlg:
    """How a rank's remote rows are dealt to overlap stages. Use one of the subclasses."""

    type: ClassVar[OverlapAlgType]


@dataclass(frozen=True)
class UniformOverlapAlg(OverlapAlg):
    """Stages of about equally many rows.

    Attributes:
        random_costs: deal by random weights instead, for tests.
        random_seed: the seed of these weights, at least 0; None for 0.
    """

    type = OverlapAlgType.UNIFORM
    random_costs: bool = False
    random_seed: int | None = None

    def __post_init__(self) -> None:
        check_type(self, "random_costs", bool)
        seed = check_type(self, "random_seed", int, type(None))
        if seed is not None and seed < 0:
            raise MagiValueError(f"UniformOverlapAlg.random_seed must be at least 0, not {seed}")


@dataclass(frozen=True)
class GreedyOverlapAlg(OverlapAlg):
    """Stages filled greedily by cost. Not implemented: planning with it raises ``NotImplementedError``."""

    type = OverlapAlgType.GREEDY
