# SPDX-License-Identifier: Apache-2.0
"""Floating-point data types by precision."""

import torch


def max_fp_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The most precise of several floating-point types; of float16 and bfloat16, float16."""
    return min(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def to_higher_fp_dtype(tensor: torch.Tensor, lowest_precision: torch.dtype) -> torch.Tensor:
    """The tensor in ``lowest_precision``, or as it is if its own type is at least as precise."""
    return tensor.to(max_fp_dtype(tensor.dtype, lowest_precision))


def as_dtype(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``tensor.to(dtype)``, which costs a call of PyTorch even where it does nothing."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
