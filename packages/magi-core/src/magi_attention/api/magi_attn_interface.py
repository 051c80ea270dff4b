# SPDX-License-Identifier: Apache-2.0
"""The API's functions, by the path that older code imports them from."""

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
from magi_attention.api.tensors import dispatch, get_position_ids, roll, roll_simple, undispatch
from magi_attention.runtime.cache import DistAttnRuntimeDictManager, dist_attn_runtime_dict_mgr

__all__ = [
    "DistAttnRuntimeDictManager",
    "GeneralAttnMaskType",
    "calc_attn",
    "clear_cache",
    "dispatch",
    "dist_attn_runtime_dict_mgr",
    "get_most_recent_key",
    "get_position_ids",
    "magi_attn_flex_dispatch",
    "magi_attn_flex_key",
    "magi_attn_varlen_dispatch",
    "magi_attn_varlen_key",
    "make_flex_key_for_new_mask_after_dispatch",
    "make_varlen_key_for_new_mask_after_dispatch",
    "roll",
    "roll_simple",
    "undispatch",
]
