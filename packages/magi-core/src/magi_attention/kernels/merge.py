# SPDX-License-Identifier: Apache-2.0
"""Merging attention outputs over disjoint keys, by their log-sum-exps."""

import torch
from torch import Tensor

from magi_attention.common.logsumexp import accumulation_dtype, merge_lse, rescale_weight
from magi_attention.utils.triton import has_triton, relaunch

_FUSED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def merge_partials(out: Tensor, lse: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Merge the attention of the same queries over two disjoint sets of keys.

    ``lse' = logaddexp(lse, lse2)`` and ``out' = exp(lse - lse') * out + exp(lse2 - lse') * out2``, where rows without
    keys have ``out = 0`` and ``lse = -inf`` and stay so if neither side has keys.

    Args:
        out, out2: ``[tq, hq, dv]``.
        lse, lse2: ``[tq, hq]``, natural logarithm.

    Returns:
        out and lse in the greatest precision among the arguments, at least float32. The arguments are not changed.
    """
    merged_lse = merge_lse(lse, lse2)
    merged = rescale(out, lse, merged_lse)
    merged += rescale(out2, lse2, merged_lse)
    return merged, merged_lse


def merge_into(out: Tensor, lse: Tensor, out2: Tensor, lse2: Tensor) -> None:
    """:func:`merge_partials` in place of ``out`` and ``lse``, rounded once to their dtypes.

    On a GPU it is one kernel, which leaves rows alone that the second attention has no keys for.
    """
    dtypes_fit = out.dtype in _FUSED_DTYPES and out2.dtype in _FUSED_DTYPES and lse.dtype == lse2.dtype == torch.float32
    if out.is_cuda and dtypes_fit and out.stride(-1) == out2.stride(-1) == 1 and has_triton():
        key = merge_into, *[(x.dtype, x.shape, x.stride()) for x in (out, lse, out2, lse2)]
        addresses = [x.data_ptr() for x in (out, lse, out2, lse2)]
        if not relaunch(key, out.get_device(), addresses, (out.shape[0] * out.shape[1],)):
            from magi_attention.kernels.triton_merge import launch_merge

            launch_merge(out, lse, out2, lse2, key)
        return
    merged, merged_lse = merge_partials(out, lse, out2, lse2)
    out.copy_(merged)
    lse.copy_(merged_lse)


def rescale(out: Tensor, lse: Tensor, final_lse: Tensor) -> Tensor:
    """Return ``exp(lse - final_lse) * out`` as a new tensor, in at least float32, with weight 0 for ``lse = -inf``."""
    dtype = accumulation_dtype(out, lse, final_lse)
    return out.to(dtype) * rescale_weight(lse.to(dtype), final_lse.to(dtype))[..., None]
