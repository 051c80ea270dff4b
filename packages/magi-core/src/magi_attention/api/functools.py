# SPDX-License-Identifier: Apache-2.0
"""Mask and padding helpers, by the path that older code imports them from."""

from magi_attention.api.masks import (
    apply_padding,
    compute_pad_size,
    infer_attn_mask_from_cu_seqlens,
    infer_attn_mask_from_sliding_window,
    infer_varlen_mask_from_batch,
    pad_at_dim,
    squash_batch_dim,
    unpad_at_dim,
)

__all__ = [
    "apply_padding",
    "compute_pad_size",
    "infer_attn_mask_from_cu_seqlens",
    "infer_attn_mask_from_sliding_window",
    "infer_varlen_mask_from_batch",
    "pad_at_dim",
    "squash_batch_dim",
    "unpad_at_dim",
]
