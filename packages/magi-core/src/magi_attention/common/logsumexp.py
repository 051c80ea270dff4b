# SPDX-License-Identifier: Apache-2.0
"""The algebra of log-sum-exps by which partial attention outputs are merged."""

import torch
from torch import Tensor


def merge_lse(lse: Tensor, lse2: Tensor) -> Tensor:
    """Return ``logaddexp(lse, lse2)`` in at least float32; -inf with -inf stays -inf."""
    dtype = accumulation_dtype(lse, lse2)
    return torch.logaddexp(lse.to(dtype), lse2.to(dtype))


def rescale_weight(lse: Tensor, final_lse: Tensor) -> Tensor:
    """Return ``exp(lse - final_lse)``: the share of a part in the whole; 0 where either is -inf."""
    return torch.exp(lse - final_lse).masked_fill_((lse == -torch.inf) | (final_lse == -torch.inf), 0.0)


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype in which sums over the tensors are kept: float64 if any of them is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
