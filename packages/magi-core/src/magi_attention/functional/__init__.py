# SPDX-License-Identifier: Apache-2.0
"""Attention and its building blocks as functions of tensors."""

from magi_attention.functional.correction import (
    correct_attn_lse,
    correct_attn_lse_with_sink,
    correct_attn_out,
    correct_attn_out_lse,
    correct_attn_out_lse_with_sink,
    correct_attn_out_with_sink,
)
from magi_attention.functional.dist import (
    dispatch_func,
    dist_attn_func,
    roll_func,
    roll_simple_func,
    undispatch_func,
)
from magi_attention.functional.ffa_fa4 import ffa_fa4_func
from magi_attention.functional.flex_flash_attn import flex_flash_attn_func

__all__ = [
    "correct_attn_lse",
    "correct_attn_lse_with_sink",
    "correct_attn_out",
    "correct_attn_out_lse",
    "correct_attn_out_lse_with_sink",
    "correct_attn_out_with_sink",
    "dispatch_func",
    "dist_attn_func",
    "ffa_fa4_func",
    "flex_flash_attn_func",
    "roll_func",
    "roll_simple_func",
    "undispatch_func",
]
