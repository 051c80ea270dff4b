# SPDX-License-Identifier: Apache-2.0
"""Small helpers: process groups, dense masks, lists, data types, seeds and cost factors."""

from magi_attention.utils.cost import get_a2a_corr_factor, get_calc_cost_factor, get_comm_cost_factor
from magi_attention.utils.dist_env import clearup_dist_env, setup_dist_env
from magi_attention.utils.dtypes import max_fp_dtype, to_higher_fp_dtype
from magi_attention.utils.lists import (
    argmax,
    argmin,
    argsort,
    cu_seqlens2seqlens,
    flatten_nested_list,
    is_list_type_all,
    is_list_value_all,
    is_list_value_any,
    perm_idxs2unperm_idxs,
    seqlens2cu_seqlens,
    transpose_matrix,
    wrap_to_list,
)
from magi_attention.utils.masks import make_attn_mask_from_ffa_args
from magi_attention.utils.seeds import set_random_seed, str2seed, sync_rng

__all__ = [
    "argmax",
    "argmin",
    "argsort",
    "clearup_dist_env",
    "cu_seqlens2seqlens",
    "flatten_nested_list",
    "get_a2a_corr_factor",
    "get_calc_cost_factor",
    "get_comm_cost_factor",
    "is_list_type_all",
    "is_list_value_all",
    "is_list_value_any",
    "make_attn_mask_from_ffa_args",
    "max_fp_dtype",
    "perm_idxs2unperm_idxs",
    "seqlens2cu_seqlens",
    "set_random_seed",
    "setup_dist_env",
    "str2seed",
    "sync_rng",
    "to_higher_fp_dtype",
    "transpose_matrix",
    "wrap_to_list",
]
