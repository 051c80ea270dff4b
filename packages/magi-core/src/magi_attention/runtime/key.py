# SPDX-License-Identifier: Apache-2.0
"""The key of one planned attention: mask, shape, process group and resolved configuration, as one value."""

from dataclasses import Field, dataclass, field, fields
from functools import cached_property
from itertools import count
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from magi_attention.comm.group import find_named_group, let_go_at_exit, name_group
from magi_attention.common.enum import AttnMaskType
from magi_attention.common.errors import MagiValueError
from magi_attention.common.range import InvalidRangeError
from magi_attention.common.ranges import AttnRanges
from magi_attention.common.slices import SliceTable
from magi_attention.config import DistAttnConfig

_handles = count()
_keys_by_handle: "WeakValueDictionary[int, DistAttnRuntimeKey]" = WeakValueDictionary()


@dataclass(frozen=True)
class DistAttnRuntimeKey:
    """What a planned attention is found by. Keys are made by ``magi_attn_flex_key`` and its relatives.

    A key holds copies of the ranges that it is made of. All fields take part in equality and in the hash. It is frozen
    as a dataclass is, but is none to others: FSDP's mixed precision, for one, would make every dataclass among the
    arguments of a module anew. It can be pickled, as with a module that holds it, and is of the same group once it is
    loaded by the same rank of that; elsewhere it is of none, and must be made again.

    Attributes:
        q_ranges: query ranges of the slices, padding included.
        k_ranges: key ranges of the slices, padding included.
        attn_mask_type: the slices' types.
        total_seqlen_q: rows of the sequence of queries, padding included.
        total_seqlen_k: the same for keys.
        num_heads_q: query heads.
        num_heads_kv: key and value heads.
        head_dim: size of a head.
        pad_size: rows of padding at the end of the sequence of queries.
        chunk_size: rows of a chunk of queries; if the planner chose it and cut where documents start, about so many.
        cp_group: the context-parallel group; None for a group of this process alone, without torch.distributed.
        cp_mesh: the mesh that the group was given as; None for a plain group.
        dist_attn_config: the configuration, with every setting of its ``runtime_config`` resolved.
        uneven_shard: whether ranks may hold different numbers of rows; then there is no padding.
        is_deterministic_mode_enable: from the configuration, as the fields that follow.
        layout_key: the key whose layouts this one shares, if it was made for a new mask after dispatch.
        layout_key_k: the key whose layout of keys this one shares, if that isn't ``layout_key``.
        is_same_source: whether queries and keys are of one sequence (self-attention).
        is_q_permutable: whether ranks may hold other than contiguous shares of the queries.
        is_k_permutable: the same for keys.
        pad_size_k: rows of padding at the end of the sequence of keys; taken from ``pad_size`` in self-attention.
        chunk_size_k: rows of a chunk of keys; taken from ``chunk_size`` in self-attention.

    Raises:
        RangeError: A range starts below 0 or ends before it starts; the error is a ``ValueError`` as well.
        MagiValueError: The numbers of ranges and types differ, settings of the configuration contradict each other, or
            ``chunk_size_k`` is missing in cross-attention.
    """

    q_ranges: AttnRanges
    k_ranges: AttnRanges
    attn_mask_type: tuple[AttnMaskType, ...]
    total_seqlen_q: int
    total_seqlen_k: int
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    pad_size: int
    chunk_size: int
    cp_group: dist.ProcessGroup | None
    cp_mesh: DeviceMesh | None
    dist_attn_config: DistAttnConfig
    uneven_shard: bool = field(init=False)
    is_deterministic_mode_enable: bool = field(init=False)
    is_hierarchical_comm_enable: bool = field(init=False)
    is_qo_comm_enable: bool = field(init=False)
    is_native_grpcoll_enable: bool = field(init=False)
    is_flatten_head_groups_enable: bool = field(init=False)
    kernel_backend: str = field(init=False)
    precision: str = field(init=False)
    is_auto_range_merge_enable: bool = field(init=False)
    layout_key: "DistAttnRuntimeKey | None" = field(default=None, repr=False)
    is_same_source: bool = True
    is_q_permutable: bool = True
    is_k_permutable: bool = True
    pad_size_k: int = 0
    chunk_size_k: int = 0
    layout_key_k: "DistAttnRuntimeKey | None" = field(default=None, repr=False)
    # Set on each instance, but no field: equal keys have different handles.
    handle: ClassVar[int]
    # This rank's rows of queries and of keys, once planned; also no field, and only there for compiled programs.
    local_rows: ClassVar[tuple[int, int] | None] = None

    def __post_init__(self) -> None:
        config = self.dist_attn_config.resolved()
        runtime = config.runtime_config
        derived = {
            "q_ranges": _checked_copy(self.q_ranges),
            "k_ranges": _checked_copy(self.k_ranges),
            "attn_mask_type": tuple(self.attn_mask_type),
            "dist_attn_config": config,
            "uneven_shard": config.dispatch_config.uneven_shard,
            "is_deterministic_mode_enable": runtime.deterministic,
            "is_hierarchical_comm_enable": runtime.hierarchical_comm,
            "is_qo_comm_enable": runtime.qo_comm,
            "is_native_grpcoll_enable": runtime.native_grpcoll,
            "is_flatten_head_groups_enable": runtime.flatten_head_groups,
            "kernel_backend": runtime.kernel_backend,
            "precision": runtime.precision,
            "is_auto_range_merge_enable": runtime.auto_range_merge,
        }
        if self.is_same_source:
            derived |= {"pad_size_k": self.pad_size, "chunk_size_k": self.chunk_size}
        # A numpy integer would be equal, but not to a rank that compares digests.
        given = vars(self) | derived
        derived |= {each.name: int(given[each.name]) for each in _FIELDS if each.type in (int, "int")}
        for name, value in derived.items():
            object.__setattr__(self, name, value)
        let_go_at_exit(self, "cp_group", "cp_mesh")
        self._take_handle()
        if not len(self.q_ranges) == len(self.k_ranges) == len(self.attn_mask_type):
            raise MagiValueError(
                f"every slice needs a q range, a k range and a mask type, but there are {len(self.q_ranges)} q ranges, "
                f"{len(self.k_ranges)} k ranges and {len(self.attn_mask_type)} types"
            )
        if not self.is_same_source and self.chunk_size_k < 1:
            raise MagiValueError(
                f"chunk_size_k is {self.chunk_size_k}; keys of another source need chunks of their own"
            )

    def replaced(self, **changes: Any) -> "DistAttnRuntimeKey":
        """A key with other values of some fields; nothing is planned for it."""
        return DistAttnRuntimeKey(**{each.name: getattr(self, each.name) for each in _FIELDS if each.init} | changes)

    def _take_handle(self) -> None:
        """Give the key a number of its own, by which compiled programs name it: they hold no objects."""
        object.__setattr__(self, "handle", next(_handles))
        _keys_by_handle[self.handle] = self

    def note_local_rows(self, num_queries: int, num_keys: int) -> None:
        """Keep how many rows this rank holds, which a compiler reads from the key rather than from the plan."""
        object.__setattr__(self, "local_rows", (num_queries, num_keys))

    @cached_property
    def slices(self) -> SliceTable:
        """The padded mask as a slice table."""
        types = [mask_type.to_int_type() for mask_type in self.attn_mask_type]
        return SliceTable.from_lists(self.q_ranges.to_naive_ranges(), self.k_ranges.to_naive_ranges(), types)

    @cached_property
    def group_ranks(self) -> tuple[int, ...]:
        """The sorted global ranks of the context-parallel group."""
        return sorted_global_ranks(self.cp_group)

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, each.name) for each in _FIELDS))

    def __hash__(self) -> int:
        return self._hash

    def __deepcopy__(self, memo: dict[int, Any]) -> "DistAttnRuntimeKey":
        """The key itself, which never changes: process groups have no copies, and a model may hold its key."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        # What is memoized and the handle hold in this process only, and the handle for this object only.
        memoized = ("_hash", "group_ranks", "handle")
        state = {name: value for name, value in vars(self).items() if name not in memoized}
        return state | {"cp_group": name_group(self.cp_group)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        named = state["cp_group"]
        group = find_named_group(named)
        if group is None and named is not None:  # saved by another rank, say, whose rows are not this one's
            state = {name: value for name, value in state.items() if name != "local_rows"} | {"cp_mesh": None}
        self.__dict__.update(state | {"cp_group": group})
        let_go_at_exit(self, "cp_group", "cp_mesh")
        self._take_handle()


_FIELDS: tuple[Field[Any], ...] = fields(DistAttnRuntimeKey)
# By this attribute a dataclass is known; what __init__ and its like need of it they hold themselves.
del DistAttnRuntimeKey.__dataclass_fields__


def key_of_handle(handle: int) -> DistAttnRuntimeKey:
    """The key with this ``handle``, as long as somebody keeps it: the user, or the cache of planned attentions.

    Raises:
        ValueError: nobody does any longer.
    """
    key = _keys_by_handle.get(handle)
    if key is None:
        raise ValueError(
            "a compiled attention was called for a key that no longer exists: keep the key until the backward pass is "
            "done, or keep more keys (MAGI_ATTENTION_DIST_ATTN_RUNTIME_DICT_SIZE)"
        )
    return key


def sorted_global_ranks(cp_group: dist.ProcessGroup | None) -> tuple[int, ...]:
    """The group's global ranks, ascending; ``(0,)`` for None."""
    return (0,) if cp_group is None else tuple(sorted(dist.get_process_group_ranks(cp_group)))


def _checked_copy(ranges: AttnRanges) -> AttnRanges:
    for number, each in enumerate(ranges):
        if not 0 <= each.start <= each.end:
            raise InvalidRangeError(
                f"range {number} of a key is {each}: it must start at 0 or later, and not end before"
            )
    return ranges.clone()
