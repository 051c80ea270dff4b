# SPDX-License-Identifier: Apache-2.0
"""Keys: what a mask, a shape and a process group are planned and found by."""

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import deprecated

from magi_attention.api.checks import (
    GeneralAttnMaskType,
    as_integers,
    check_config,
    check_heads,
    check_ranges,
    check_sources,
    checks_plan,
    resolve_chunk_size,
    resolve_mask_types,
    warn_deprecated,
    with_chunk_limit,
)
from magi_attention.api.groups import GroupOrMesh, check_makes_keys, check_takes_two_hops, resolve_group
from magi_attention.api.masks import apply_padding, compute_pad_size, infer_attn_mask_from_cu_seqlens
from magi_attention.api.tensors import dispatch
from magi_attention.comm.agreement import failures_reported
from magi_attention.comm.group import group_size
from magi_attention.common.ranges import AttnRanges
from magi_attention.config import DistAttnConfig
from magi_attention.plan.layout import Layout
from magi_attention.runtime.cache import dist_attn_runtime_dict_mgr
from magi_attention.runtime.key import DistAttnRuntimeKey
from magi_attention.runtime.manager import build_manager


def magi_attn_flex_key(
    q_ranges: AttnRanges,
    k_ranges: AttnRanges,
    attn_mask_type: GeneralAttnMaskType,
    total_seqlen_q: int,
    total_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    pad_size: int,
    cp_group_or_mesh: GroupOrMesh,
    dist_attn_config: DistAttnConfig = DistAttnConfig(),  # noqa: B008 - frozen
    is_same_source: bool = True,
    is_q_permutable: bool = True,
    is_k_permutable: bool = True,
    chunk_size: int | None = None,
) -> DistAttnRuntimeKey:
    """Plan a distributed attention and return the key that it is used by.

    The mask is given as slices, three parallel lists; every (query, key) pair may be kept by one slice only. The
    sequence is padded, chunked and dealt to the ranks of the group. All ranks must call this with equal arguments: they
    plan alone, and compare their plans once for every new key.

    In cross-attention, with ``is_same_source=False``, queries and keys are of two sequences, each padded, chunked and
    dealt for itself. ``dispatch`` and its relatives then take an ``attn_role`` that tells which one is meant.

    Args:
        q_ranges: query rows of the slices.
        k_ranges: key rows of the slices.
        attn_mask_type: the slices' types; a single type stands for all.
        total_seqlen_q: rows of the whole sequence of queries.
        total_seqlen_k: rows of the whole sequence of keys; the same number if that is the same sequence.
        num_heads_q: query heads.
        num_heads_kv: key and value heads.
        head_dim: size of a head.
        pad_size: ignored; a number other than 0 is deprecated. ``key.pad_size`` tells the padding, ``key.pad_size_k``
            that of the keys.
        cp_group_or_mesh: the context-parallel group; a 1-D mesh; a 2-D mesh (nodes, ranks of a node); or None for the
            default group, which without torch.distributed is this process alone.
        dist_attn_config: how chunks are dealt, how communication overlaps, what computes.
        is_same_source: whether queries and keys are of one sequence, and so lie on the same ranks. Then the two flags
            that follow must be True.
        is_q_permutable: whether queries may be dealt in any order, as the dispatch algorithm likes. Otherwise every
            rank gets a contiguous share, the first rank the first.
        is_k_permutable: the same for keys, whose chunks go to the ranks that read most of them.
        chunk_size: deprecated; see ``DispatchConfig``. At most this many rows make a chunk.

    Returns:
        The key. Asking again for an equal one plans nothing, and makes it the group's most recent key.

    Raises:
        ValueError: Ranges outside of the sequence, lists of different lengths, an unknown type name, pairs that are
            kept twice, an empty mask, fewer rows than ranks, query heads that aren't a multiple of the key heads,
            contradictory settings or flags, neither group nor mesh. Where older versions raised ``AssertionError``, the
            error is one as well.
        TypeError: A mask type that is neither an ``AttnMaskType`` nor a name, or a count that is no integer.
        RuntimeError: The ranks passed different arguments; raised on every rank, naming the ranks. Or the process is a
            worker of a data loader.

    Example:
        >>> ranges = AttnRanges.from_ranges([(0, 60), (60, 100)])
        >>> key = magi_attn_flex_key(ranges, ranges, "causal", 100, 100, 8, 2, 64, 0, None)
        >>> key.chunk_size, key.pad_size
        (13, 4)
    """
    check_makes_keys()
    cp_group, cp_mesh = resolve_group(cp_group_or_mesh)
    with failures_reported(cp_group, checks_plan(dist_attn_config)):
        check_config(dist_attn_config)
        config = dist_attn_config.resolved()
        if config.runtime_config.hierarchical_comm:
            check_takes_two_hops(cp_group_or_mesh)
        total_seqlen_q, total_seqlen_k, num_heads_q, num_heads_kv, head_dim = as_integers(
            total_seqlen_q=total_seqlen_q,
            total_seqlen_k=total_seqlen_k,
            num_heads_q=num_heads_q,
            num_heads_kv=num_heads_kv,
            head_dim=head_dim,
        )
        check_heads(num_heads_q, num_heads_kv, head_dim)
        config = with_chunk_limit(config, chunk_size)
        check_sources(total_seqlen_q, total_seqlen_k, is_same_source, is_q_permutable, is_k_permutable)
        check_ranges(q_ranges, k_ranges, total_seqlen_q, total_seqlen_k)
        mask_types = resolve_mask_types(attn_mask_type, len(q_ranges))
        cp_size = group_size(cp_group)
        dispatching = config.dispatch_config
        chunk_size = resolve_chunk_size(total_seqlen_q, cp_size, dispatching.chunk_size, dispatching.alg)
        chunk_size_k = resolve_chunk_size(total_seqlen_k, cp_size, dispatching.chunk_size, dispatching.alg)
        if pad_size:
            warn_deprecated("pad_size is deprecated and ignored: read key.pad_size")
        is_uneven = dispatching.uneven_shard
        pad_size = 0 if is_uneven else compute_pad_size(total_seqlen_q, cp_size, chunk_size)
        pad_size_k = 0 if is_uneven else compute_pad_size(total_seqlen_k, cp_size, chunk_size_k)
        if pad_size:
            q_ranges, k_ranges, mask_types = apply_padding(q_ranges, k_ranges, mask_types, total_seqlen_q, pad_size)
        key = DistAttnRuntimeKey(
            q_ranges=q_ranges,
            k_ranges=k_ranges,
            attn_mask_type=tuple(mask_types),
            total_seqlen_q=total_seqlen_q + pad_size,
            total_seqlen_k=total_seqlen_k + pad_size_k,
            num_heads_q=num_heads_q,
            num_heads_kv=num_heads_kv,
            head_dim=head_dim,
            pad_size=pad_size,
            chunk_size=chunk_size,
            cp_group=cp_group,
            cp_mesh=cp_mesh,
            dist_attn_config=config,
            is_same_source=is_same_source,
            is_q_permutable=is_q_permutable,
            is_k_permutable=is_k_permutable,
            pad_size_k=pad_size_k,
            chunk_size_k=chunk_size_k,
        )
    return plan_if_new(key)


def magi_attn_varlen_key(
    cu_seqlens_q: Tensor | Sequence[int],
    cu_seqlens_k: Tensor | Sequence[int],
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    pad_size: int,
    cp_group_or_mesh: GroupOrMesh,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    dist_attn_config: DistAttnConfig = DistAttnConfig(),  # noqa: B008 - frozen
    chunk_size: int | None = None,
    is_same_source: bool = True,
    is_q_permutable: bool = True,
    is_k_permutable: bool = True,
) -> DistAttnRuntimeKey:
    """Plan the attention of packed documents, each to itself only, and return its key.

    With ``is_same_source=False`` it is a cross-attention: the queries of each document attend to that document's keys.

    Args:
        cu_seqlens_q: ``[documents + 1]`` integers, the documents' first rows and at last the total.
        cu_seqlens_k: the same for keys, with the same total unless they are of another sequence.
        num_heads_q: query heads.
        num_heads_kv: key and value heads.
        head_dim: size of a head.
        pad_size: ignored, as for :func:`magi_attn_flex_key`.
        cp_group_or_mesh: as for :func:`magi_attn_flex_key`.
        causal: each document is causal; not together with a window.
        window_size: ``(left, right)`` of a sliding window inside each document; -1 means no limit.
        dist_attn_config: as for :func:`magi_attn_flex_key`.
        chunk_size: deprecated, as for :func:`magi_attn_flex_key`.
        is_same_source: whether queries and keys are of one sequence, as for :func:`magi_attn_flex_key`.
        is_q_permutable: whether queries may be dealt in any order, as there.
        is_k_permutable: whether keys may, as there.

    Raises:
        ValueError: ``causal`` with a window, lengths that shrink, and all that :func:`magi_attn_flex_key` raises.
    """
    check_makes_keys()
    cp_group, _ = resolve_group(cp_group_or_mesh)
    with failures_reported(cp_group, checks_plan(dist_attn_config)):
        q_ranges, k_ranges, mask_types, total_q, total_k = infer_attn_mask_from_cu_seqlens(
            cu_seqlens_q, cu_seqlens_k, causal, window_size
        )
    return magi_attn_flex_key(
        q_ranges,
        k_ranges,
        mask_types,
        total_q,
        total_k,
        num_heads_q,
        num_heads_kv,
        head_dim,
        pad_size,
        cp_group_or_mesh,
        dist_attn_config,
        is_same_source,
        is_q_permutable,
        is_k_permutable,
        chunk_size,
    )


@deprecated("magi_attn_flex_dispatch is deprecated: call magi_attn_flex_key, then dispatch")
def magi_attn_flex_dispatch(
    x: Tensor,
    q_ranges: AttnRanges,
    k_ranges: AttnRanges,
    attn_mask_type: GeneralAttnMaskType,
    total_seqlen_q: int,
    total_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    pad_size: int,
    cp_group_or_mesh: GroupOrMesh,
    dist_attn_config: DistAttnConfig = DistAttnConfig(),  # noqa: B008 - frozen
    is_same_source: bool = True,
    is_q_permutable: bool = True,
    is_k_permutable: bool = True,
    chunk_size: int | None = None,
) -> tuple[Tensor, DistAttnRuntimeKey]:
    """Make a key by :func:`magi_attn_flex_key` and dispatch ``x``, as queries, with it; returns both."""
    key = magi_attn_flex_key(
        q_ranges,
        k_ranges,
        attn_mask_type,
        total_seqlen_q,
        total_seqlen_k,
        num_heads_q,
        num_heads_kv,
        head_dim,
        pad_size,
        cp_group_or_mesh,
        dist_attn_config,
        is_same_source,
        is_q_permutable,
        is_k_permutable,
        chunk_size,
    )
    return dispatch(x, key), key


@deprecated("magi_attn_varlen_dispatch is deprecated: call magi_attn_varlen_key, then dispatch")
def magi_attn_varlen_dispatch(
    x: Tensor,
    cu_seqlens_q: Tensor | Sequence[int],
    cu_seqlens_k: Tensor | Sequence[int],
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    pad_size: int,
    cp_group_or_mesh: GroupOrMesh,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    dist_attn_config: DistAttnConfig = DistAttnConfig(),  # noqa: B008 - frozen
    chunk_size: int | None = None,
    is_same_source: bool = True,
    is_q_permutable: bool = True,
    is_k_permutable: bool = True,
) -> tuple[Tensor, DistAttnRuntimeKey]:
    """Make a key by :func:`magi_attn_varlen_key` and dispatch ``x``, as queries, with it; returns both."""
    key = magi_attn_varlen_key(
        cu_seqlens_q,
        cu_seqlens_k,
        num_heads_q,
        num_heads_kv,
        head_dim,
        pad_size,
        cp_group_or_mesh,
        causal,
        window_size,
        dist_attn_config,
        chunk_size,
        is_same_source,
        is_q_permutable,
        is_k_permutable,
    )
    return dispatch(x, key), key


def get_most_recent_key(cp_group: dist.ProcessGroup | DeviceMesh) -> DistAttnRuntimeKey:
    """The key of a group, or of a mesh, that was made, asked for or used last.

    Raises:
        ValueError: The group has none or was destroyed, or ``cp_group`` is None.
    """
    key = dist_attn_runtime_dict_mgr.get_most_recent_key(_group_of(cp_group))
    if key is None:
        raise ValueError("this group has no key yet: make one by magi_attn_flex_key")
    return key


def clear_cache(cp_group: GroupOrMesh = None) -> None:
    """Forget the keys of a group or mesh, or for None of all groups. Keys that are forgotten can no longer be used.

    Raises:
        ValueError: The group was destroyed; its keys are forgotten with the next key that is made, or for None.
    """
    dist_attn_runtime_dict_mgr.clear(_group_of(cp_group))


def _group_of(cp_group: GroupOrMesh) -> dist.ProcessGroup | None:
    """The group of a group or mesh; None stays None."""
    return None if cp_group is None else resolve_group(cp_group)[0]


def plan_if_new(
    key: DistAttnRuntimeKey, layout: Layout | None = None, key_layout: Layout | None = None
) -> DistAttnRuntimeKey:
    """Make ``key`` its group's most recent one, and plan for it unless that was done, keeping the layouts given.

    Returns the key as the cache holds it: the same object is found without comparing masks.
    """
    manager = dist_attn_runtime_dict_mgr.get(key)
    if manager is None:
        manager = dist_attn_runtime_dict_mgr[key] = build_manager(key, layout, key_layout)
    return manager.key
