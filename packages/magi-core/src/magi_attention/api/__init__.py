# SPDX-License-Identifier: Apache-2.0
"""The public API: make a key from a mask, then ``dispatch``, ``calc_attn`` and ``undispatch`` with it."""

from magi_attention.api.attention import calc_attn
from magi_attention.api.checks import GeneralAttnMaskType
from magi_attention.api.keys import (
    clear_cache,
    get_most_recent_key,
    magi_attn_flex_dispatch,
    magi_attn_flex_key,
    magi_attn_varlen_dispatch,
    magi_attn_varlen_key,
)
from magi_attention.api.keys_after_dispatch import (
    make_flex_key_for_new_mask_after_dispatch,
    make_varlen_key_for_new_mask_after_dispatch,
)
from magi_attention.api.masks import (
    compute_pad_size,
    infer_attn_mask_from_cu_seqlens,
    infer_attn_mask_from_sliding_window,
    infer_varlen_mask_from_batch,
    squash_batch_dim,
)
from magi_attention.api.tensors import dispatch, get_position_ids, roll, roll_simple, undispatch
from magi_attention.common.enum import AttnMaskType, AttnOverlapMode
from magi_attention.common.forward_meta import AttnForwardMeta
from magi_attention.common.ranges import AttnRanges
from magi_attention.config import (
    BSDispatchAlg,
    DispatchAlg,
    DispatchConfig,
    DistAttnConfig,
    DPDispatchAlg,
    GreedyOverlapAlg,
    GrpCollConfig,
    LBDispatchAlg,
    MinHeapDispatchAlg,
    OverlapAlg,
    OverlapConfig,
    SequentialDispatchAlg,
    SortedSequentialSelectAlg,
    ToppHeapDispatchAlg,
    UniformOverlapAlg,
)
from magi_attention.functional import flex_flash_attn_func
from magi_attention.runtime.cache import DistAttnRuntimeDictManager, dist_attn_runtime_dict_mgr
from magi_attention.runtime.key import DistAttnRuntimeKey

__all__ = [
    "AttnForwardMeta",
    "AttnMaskType",
    "AttnOverlapMode",
    "AttnRanges",
    "BSDispatchAlg",
    "DPDispatchAlg",
    "DispatchAlg",
    "DispatchConfig",
    "DistAttnConfig",
    "DistAttnRuntimeDictManager",
    "DistAttnRuntimeKey",
    "GeneralAttnMaskType",
    "GreedyOverlapAlg",
    "GrpCollConfig",
    "LBDispatchAlg",
    "MinHeapDispatchAlg",
    "OverlapAlg",
    "OverlapConfig",
    "SequentialDispatchAlg",
    "SortedSequentialSelectAlg",
    "ToppHeapDispatchAlg",
    "UniformOverlapAlg",
    "calc_attn",
    "clear_cache",
    "compute_pad_size",
    "dispatch",
    "dist_attn_runtime_dict_mgr",
    "flex_flash_attn_func",
    "get_most_recent_key",
    "get_position_ids",
    "infer_attn_mask_from_cu_seqlens",
    "infer_attn_mask_from_sliding_window",
    "infer_varlen_mask_from_batch",
    "magi_attn_flex_dispatch",
    "magi_attn_flex_key",
    "magi_attn_varlen_dispatch",
    "magi_attn_varlen_key",
    "make_flex_key_for_new_mask_after_dispatch",
    "make_varlen_key_for_new_mask_after_dispatch",
    "roll",
    "roll_simple",
    "squash_batch_dim",
    "undispatch",
]
