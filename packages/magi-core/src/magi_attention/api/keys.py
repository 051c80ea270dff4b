# SPDX-License-Identifier: Apache-2.0
"""Keys: what a mask, a shape and a process group are planned and found by."""

import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch.distributed as dist
from torch import Tensor
from typing_extensions import deprecated

from magi_attention.api.checks import (
    GeneralAttnMaskType,
    check_ranges,
    check_sources,
    choose_chunk_limit,
    resolve_chunk_size,
    resolve_mask_types,
)
from magi_attention.api.groups import GroupOrMesh, resolve_group
from magi_attention.api.masks import apply_padding, compute_pad_size, infer_attn_mask_from_cu_seqlens
from magi_attention.api.tensors import dispatch
from magi_attention.comm.group import group_size
from magi_attention.common.enum import AttnMaskType
from magi_attention.common.errors import MagiValueError
from magi_attention.common.ranges import AttnRanges
from magi_attention.config import DistAttnConfig
from magi_attention.plan.layout import Layout
from magi_attention.runtime.cache import dist_attn_runtime_dict_mgr, find_manager
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
            kept twice, an empty mask, fewer rows than ranks, contradictory settings or flags, neither group nor mesh.
            Where older versions raised ``AssertionError``, the error is one as well.
        TypeError: A mask type that is neither an ``AttnMaskType`` nor a name.
        RuntimeError: The ranks passed different arguments; raised on every rank, naming the ranks.

    Example:
        >>> ranges = AttnRanges.from_ranges([(0, 60), (60, 100)])
        >>> key = magi_attn_flex_key(ranges, ranges, "causal", 100, 100, 8, 2, 64, 0, None)
        >>> key.chunk_size, key.pad_size
        (13, 4)
    """
    if not isinstance(dist_attn_config, DistAttnConfig):
        raise TypeError(f"dist_attn_config must be a DistAttnConfig, not {dist_attn_config!r}")
    config = dist_attn_config.resolved()
    chunk_limit = choose_chunk_limit(chunk_size, config)
    check_sources(total_seqlen_q, total_seqlen_k, is_same_source, is_q_permutable, is_k_permutable)
    check_ranges(q_ranges, k_ranges, total_seqlen_q, total_seqlen_k)
    mask_types = resolve_mask_types(attn_mask_type, len(q_ranges))
    cp_group, cp_mesh = resolve_group(cp_group_or_mesh, bool(config.runtime_config.hierarchical_comm))
    cp_size = group_size(cp_group)
    chunk_size = resolve_chunk_size(total_seqlen_q, cp_size, chunk_limit, config.dispatch_config.alg)
    chunk_size_k = resolve_chunk_size(total_seqlen_k, cp_size, chunk_limit, config.dispatch_config.alg)
    if pad_size:
        warnings.warn("pad_size is deprecated and ignored: read key.pad_size", DeprecationWarning, stacklevel=2)
    is_uneven = config.dispatch_config.uneven_shard
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
    return _plan_if_new(key)


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


def make_flex_key_for_new_mask_after_dispatch(
    q_ranges: AttnRanges,
    k_ranges: AttnRanges,
    attn_mask_type: GeneralAttnMaskType,
    key_for_dispatch: DistAttnRuntimeKey,
    num_heads_q: int | None = None,
    num_heads_kv: int | None = None,
    head_dim: int | None = None,
    dist_attn_config: DistAttnConfig | None = None,
    key_for_kv_dispatch: DistAttnRuntimeKey | None = None,
) -> DistAttnRuntimeKey:
    """Plan another mask over tensors that are already dispatched with ``key_for_dispatch``.

    ``calc_attn`` with either key takes the same local tensors, and ``undispatch`` with either gives the same.

    With ``key_for_kv_dispatch``, keys and values are those of another sequence, dispatched with that key: where layers
    alternate between self- and cross-attention, a decoder's rows and an encoder's memory stay where their own keys laid
    them.

    Args:
        q_ranges: query rows of the new mask's slices.
        k_ranges: key rows of the slices.
        attn_mask_type: the slices' types; a single type stands for all.
        key_for_dispatch: the key whose layouts, of queries and of keys, are kept, with their chunks, padding, group and
            dispatch config.
        num_heads_q: query heads; those of the old key for None.
        num_heads_kv: key and value heads; those of the old key for None.
        head_dim: size of a head; that of the old key for None.
        dist_attn_config: overlap and runtime config are taken from here; from the old key for None.
        key_for_kv_dispatch: the key whose layout of keys is kept; ``key_for_dispatch`` for None.

    Raises:
        ValueError: The cache doesn't hold one of the keys, they are of different groups, and all that
            :func:`magi_attn_flex_key` raises for masks.
    """
    old = key_for_dispatch
    old_k = old if key_for_kv_dispatch is None else key_for_kv_dispatch
    layout, key_layout = find_manager(old).layout, find_manager(old_k).key_layout
    if old_k.group_ranks != old.group_ranks:
        raise MagiValueError(
            f"key_for_dispatch is of the ranks {list(old.group_ranks)} and key_for_kv_dispatch of "
            f"{list(old_k.group_ranks)}; both must be made with the same group"
        )
    source = dist_attn_config or old.dist_attn_config
    config = DistAttnConfig(
        dispatch_config=old.dist_attn_config.dispatch_config,
        overlap_config=source.overlap_config,
        runtime_config=source.runtime_config,
    ).resolved()
    check_ranges(q_ranges, k_ranges, old.total_seqlen_q, old_k.total_seqlen_k)
    mask_types: Sequence[AttnMaskType] = resolve_mask_types(attn_mask_type, len(q_ranges))
    resolve_group(old.cp_group if old.cp_mesh is None else old.cp_mesh, bool(config.runtime_config.hierarchical_comm))
    if old.pad_size:
        num_real = old.total_seqlen_q - old.pad_size
        q_ranges, k_ranges, mask_types = apply_padding(q_ranges, k_ranges, mask_types, num_real, old.pad_size)
    key = replace(
        old,
        q_ranges=q_ranges,
        k_ranges=k_ranges,
        attn_mask_type=tuple(mask_types),
        num_heads_q=old.num_heads_q if num_heads_q is None else num_heads_q,
        num_heads_kv=old.num_heads_kv if num_heads_kv is None else num_heads_kv,
        head_dim=old.head_dim if head_dim is None else head_dim,
        dist_attn_config=config,
        layout_key=old.layout_key or old,
        total_seqlen_k=old_k.total_seqlen_k,
        pad_size_k=old_k.pad_size_k,
        chunk_size_k=old_k.chunk_size_k,
        is_same_source=layout is key_layout,
        is_k_permutable=old_k.is_k_permutable,
        layout_key_k=_key_of_key_layout(old, old_k),
    )
    return _plan_if_new(key, layout, key_layout)


def _key_of_key_layout(old: DistAttnRuntimeKey, old_k: DistAttnRuntimeKey) -> DistAttnRuntimeKey | None:
    """The key that the layout of keys of ``old_k`` was first made for; None if the layout of queries of ``old`` was."""
    queries, keys = old.layout_key or old, old_k.layout_key_k or old_k.layout_key or old_k
    return None if keys == queries else keys


def make_varlen_key_for_new_mask_after_dispatch(
    cu_seqlens_q: Tensor | Sequence[int],
    cu_seqlens_k: Tensor | Sequence[int],
    key_for_dispatch: DistAttnRuntimeKey,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    dist_attn_config: DistAttnConfig | None = None,
    key_for_kv_dispatch: DistAttnRuntimeKey | None = None,
) -> DistAttnRuntimeKey:
    """As :func:`make_flex_key_for_new_mask_after_dispatch`, for packed documents as in :func:`magi_attn_varlen_key`."""
    q_ranges, k_ranges, mask_types, _, _ = infer_attn_mask_from_cu_seqlens(
        cu_seqlens_q, cu_seqlens_k, causal, window_size
    )
    return make_flex_key_for_new_mask_after_dispatch(
        q_ranges,
        k_ranges,
        mask_types,
        key_for_dispatch,
        dist_attn_config=dist_attn_config,
        key_for_kv_dispatch=key_for_kv_dispatch,
    )


def get_most_recent_key(cp_group: dist.ProcessGroup) -> DistAttnRuntimeKey:
    """The group's key that was made, asked for or used last.

    Raises:
        ValueError: The group has none, or ``cp_group`` is None.
    """
    key = dist_attn_runtime_dict_mgr.get_most_recent_key(cp_group)
    if key is None:
        raise ValueError("this group has no key yet: make one by magi_attn_flex_key")
    return key


def clear_cache(cp_group: dist.ProcessGroup | None = None) -> None:
    """Forget the keys of a group, or for None of all groups. Keys that are forgotten can no longer be used."""
    dist_attn_runtime_dict_mgr.clear(cp_group)


def _plan_if_new(
    key: DistAttnRuntimeKey, layout: Layout | None = None, key_layout: Layout | None = None
) -> DistAttnRuntimeKey:
    """Make ``key`` its group's most recent one, and plan for it unless that was done, keeping the layouts given.

    Returns the key as the cache holds it: the same object is found without comparing masks.
    """
    manager = dist_attn_runtime_dict_mgr.get(key)
    if manager is None:
        manager = dist_attn_runtime_dict_mgr[key] = build_manager(key, layout, key_layout)
    return manager.key
