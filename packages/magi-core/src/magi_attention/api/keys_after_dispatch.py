# SPDX-License-Identifier: Apache-2.0
"""Keys of further masks over tensors that are already dispatched."""

from collections.abc import Sequence

from torch import Tensor

from magi_attention.api.checks import (
    GeneralAttnMaskType,
    as_integers,
    check_config,
    check_heads,
    check_ranges,
    checks_plan,
    resolve_mask_types,
)
from magi_attention.api.groups import check_makes_keys, check_takes_two_hops
from magi_attention.api.keys import plan_if_new
from magi_attention.api.masks import apply_padding, infer_attn_mask_from_cu_seqlens
from magi_attention.comm.agreement import failures_reported
from magi_attention.common.enum import AttnMaskType
from magi_attention.common.errors import MagiValueError
from magi_attention.common.ranges import AttnRanges
from magi_attention.config import DistAttnConfig
from magi_attention.runtime.cache import find_manager
from magi_attention.runtime.key import DistAttnRuntimeKey
from magi_attention.runtime.manager import DistAttnRuntimeMgr


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
        ValueError: The cache doesn't hold one of the keys, their group was destroyed, they are of different groups, and
            all that :func:`magi_attn_flex_key` raises for masks.
        TypeError: A key that is none, a config that is no ``DistAttnConfig``, and as there.
        RuntimeError: As there.
    """
    check_makes_keys()
    old = key_for_dispatch
    old_k = old if key_for_kv_dispatch is None else key_for_kv_dispatch
    layout, key_layout = _manager_of(old).layout, _manager_of(old_k).key_layout
    if old_k.group_ranks != old.group_ranks:
        raise MagiValueError(
            f"key_for_dispatch is of the ranks {list(old.group_ranks)} and key_for_kv_dispatch of "
            f"{list(old_k.group_ranks)}; both must be made with the same group"
        )
    source = old.dist_attn_config if dist_attn_config is None else dist_attn_config
    with failures_reported(old.cp_group, checks_plan(source)):
        check_config(source)
        config = DistAttnConfig(
            dispatch_config=old.dist_attn_config.dispatch_config,
            overlap_config=source.overlap_config,
            runtime_config=source.runtime_config,
        ).resolved()
        num_heads_q, num_heads_kv, head_dim = as_integers(
            num_heads_q=old.num_heads_q if num_heads_q is None else num_heads_q,
            num_heads_kv=old.num_heads_kv if num_heads_kv is None else num_heads_kv,
            head_dim=old.head_dim if head_dim is None else head_dim,
        )
        check_heads(num_heads_q, num_heads_kv, head_dim)
        num_real = old.total_seqlen_q - old.pad_size
        check_ranges(q_ranges, k_ranges, num_real, old_k.total_seqlen_k - old_k.pad_size_k)
        mask_types: Sequence[AttnMaskType] = resolve_mask_types(attn_mask_type, len(q_ranges))
        if config.runtime_config.hierarchical_comm:
            check_takes_two_hops(old.cp_group if old.cp_mesh is None else old.cp_mesh)
        if old.pad_size:
            q_ranges, k_ranges, mask_types = apply_padding(q_ranges, k_ranges, mask_types, num_real, old.pad_size)
        key = old.replaced(
            q_ranges=q_ranges,
            k_ranges=k_ranges,
            attn_mask_type=tuple(mask_types),
            num_heads_q=num_heads_q,
            num_heads_kv=num_heads_kv,
            head_dim=head_dim,
            dist_attn_config=config,
            layout_key=old.layout_key or old,
            total_seqlen_k=old_k.total_seqlen_k,
            pad_size_k=old_k.pad_size_k,
            chunk_size_k=old_k.chunk_size_k,
            is_same_source=layout is key_layout,
            is_k_permutable=old_k.is_k_permutable,
            layout_key_k=_key_of_key_layout(old, old_k),
        )
    return plan_if_new(key, layout, key_layout)


def _manager_of(key: DistAttnRuntimeKey) -> DistAttnRuntimeMgr:
    """The manager of a key; if it is gone, the other ranks of its group hear of that too."""
    try:
        manager: DistAttnRuntimeMgr = find_manager(key)
    except ValueError:
        with failures_reported(key.cp_group, bool(key.dist_attn_config.runtime_config.check_plan)):
            raise
    return manager


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
    _manager_of(key_for_dispatch)
    source = key_for_dispatch.dist_attn_config if dist_attn_config is None else dist_attn_config
    with failures_reported(key_for_dispatch.cp_group, checks_plan(source)):
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
