# SPDX-License-Identifier: Apache-2.0
"""Keys and managers without padding, choice of chunks or cache, by the path that older code imports them from."""

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from magi_attention.api.checks import GeneralAttnMaskType, check_heads, check_ranges, check_sources, resolve_mask_types
from magi_attention.api.groups import check_makes_keys
from magi_attention.comm.group import group_size
from magi_attention.common.errors import MagiValueError
from magi_attention.common.ranges import AttnRanges
from magi_attention.config import DistAttnConfig
from magi_attention.meta import DispatchMeta
from magi_attention.runtime.cache import DistAttnRuntimeDict
from magi_attention.runtime.key import DistAttnRuntimeKey
from magi_attention.runtime.manager import DistAttnRuntimeMgr, build_manager

__all__ = [
    "DistAttnRuntimeDict",
    "DistAttnRuntimeKey",
    "DistAttnRuntimeMgr",
    "init_dist_attn_runtime_key",
    "init_dist_attn_runtime_mgr",
]


def init_dist_attn_runtime_key(
    q_ranges: AttnRanges,
    k_ranges: AttnRanges,
    attn_mask_type: GeneralAttnMaskType,
    total_seqlen_q: int,
    total_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    pad_size: int,
    chunk_size: int,
    cp_group: dist.ProcessGroup | None,
    cp_mesh: DeviceMesh | None = None,
    dist_attn_config: DistAttnConfig = DistAttnConfig(),  # noqa: B008 - frozen
    is_same_source: bool = True,
    is_q_permutable: bool = True,
    is_k_permutable: bool = True,
    pad_size_k: int = 0,
    chunk_size_k: int = 0,
) -> DistAttnRuntimeKey:
    """Make a key of its fields, as they are: nothing is planned. See :class:`DistAttnRuntimeKey`."""
    return DistAttnRuntimeKey(
        q_ranges=q_ranges,
        k_ranges=k_ranges,
        attn_mask_type=tuple(resolve_mask_types(attn_mask_type, len(q_ranges))),
        total_seqlen_q=total_seqlen_q,
        total_seqlen_k=total_seqlen_k,
        num_heads_q=num_heads_q,
        num_heads_kv=num_heads_kv,
        head_dim=head_dim,
        pad_size=pad_size,
        chunk_size=chunk_size,
        cp_group=cp_group,
        cp_mesh=cp_mesh,
        dist_attn_config=dist_attn_config,
        is_same_source=is_same_source,
        is_q_permutable=is_q_permutable,
        is_k_permutable=is_k_permutable,
        pad_size_k=pad_size_k,
        chunk_size_k=chunk_size_k,
    )


def init_dist_attn_runtime_mgr(
    q_ranges: AttnRanges,
    k_ranges: AttnRanges,
    attn_mask_type: GeneralAttnMaskType,
    total_seqlen_q: int,
    total_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    chunk_size: int,
    cp_group: dist.ProcessGroup | None,
    cp_mesh: DeviceMesh | None = None,
    dist_attn_config: DistAttnConfig = DistAttnConfig(),  # noqa: B008 - frozen
    is_same_source: bool = True,
    is_q_permutable: bool = True,
    is_k_permutable: bool = True,
    ref_dispatch_meta_q: DispatchMeta | None = None,
    ref_dispatch_meta_k: DispatchMeta | None = None,
) -> DistAttnRuntimeMgr:
    """Plan a sequence as it is, without padding, and keep the manager out of the cache. Collective.

    Args:
        q_ranges: query rows of the mask's slices.
        k_ranges: key rows of the slices.
        attn_mask_type: the slices' types or their names, or one for all.
        total_seqlen_q: rows of the sequence of queries.
        total_seqlen_k: rows of the sequence of keys.
        num_heads_q: query heads.
        num_heads_kv: key and value heads.
        head_dim: size of a head.
        chunk_size: rows of a chunk, of queries as of keys, unless a layout that is kept says otherwise.
        cp_group: the context-parallel group; None for this process alone.
        cp_mesh: the 2-D mesh of the group, for hierarchical communication.
        dist_attn_config: the configuration.
        is_same_source: as for ``magi_attn_flex_key``, as the next two.
        is_q_permutable: whether queries may be dealt in any order.
        is_k_permutable: whether keys may.
        ref_dispatch_meta_q: a layout of queries to keep instead of dealing the chunks anew.
        ref_dispatch_meta_k: the same for keys; in self-attention either stands for both.

    Raises:
        ValueError: Chunks have no rows, a sequence doesn't consist of equally many whole chunks per rank although the
            shard is even, or is of another length than the layout to keep; and all that ``magi_attn_flex_key`` raises.
    """
    check_heads(num_heads_q, num_heads_kv, head_dim)
    if chunk_size < 1:
        raise MagiValueError(f"chunk_size is {chunk_size}; it must be positive")
    check_sources(total_seqlen_q, total_seqlen_k, is_same_source, is_q_permutable, is_k_permutable)
    check_ranges(q_ranges, k_ranges, total_seqlen_q, total_seqlen_k)
    cp_size = group_size(cp_group)
    is_even = cp_size > 1 and not dist_attn_config.dispatch_config.uneven_shard
    of_queries, of_keys = ref_dispatch_meta_q, ref_dispatch_meta_k
    if is_same_source:
        of_queries = of_keys = of_queries or of_keys
    sides = (("total_seqlen_q", total_seqlen_q, of_queries), ("total_seqlen_k", total_seqlen_k, of_keys))
    for name, total, meta in sides:
        if meta is not None and meta.total_seqlen != total:
            raise MagiValueError(f"{name} is {total}, but the layout to keep is of {meta.total_seqlen} rows")
        if meta is None and is_even and total % (chunk_size * cp_size):
            raise MagiValueError(
                f"{name} is {total}; for an even shard over {cp_size} ranks it must be a multiple of "
                f"{chunk_size * cp_size}, that is of chunk_size * cp_size"
            )
    key = init_dist_attn_runtime_key(
        q_ranges,
        k_ranges,
        attn_mask_type,
        total_seqlen_q,
        total_seqlen_k,
        num_heads_q,
        num_heads_kv,
        head_dim,
        0,
        chunk_size,
        cp_group,
        cp_mesh,
        dist_attn_config,
        is_same_source,
        is_q_permutable,
        is_k_permutable,
        chunk_size_k=chunk_size,
    )
    check_makes_keys()
    return build_manager(key, *[None if meta is None else meta.layout for meta in (of_queries, of_keys)])
