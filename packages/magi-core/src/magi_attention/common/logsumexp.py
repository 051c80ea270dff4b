# SPDX-License-Identifier: Apache-2.0
"""The algebra of log-sum-exps by which partial attention outputs are merged."""

import torch
from torch import Tensor


def merge_lse(lse: Tensor, lse2: Tensor) -> Tensor:
    """Return ``logaddexp(lse, lse2)`` in at least float32; -inf with -inf stays -inf."""
    dtype = accumulation_dtype(lse, lse2)
    lse, lse2 = lse.to(dtype), lse2.to(dtype)
    if not torch.is_grad_enabled():
        return torch.logaddexp(lse, lse2)
    neither = (lse == -torch.inf) & (lse2 == -torch.inf)  # where the gradient of logaddexp would be NaN
    return torch.logaddexp(lse.masked_fill(neither, 0.0), lse2).masked_fill(neither, -torch.inf)


def rescale_weight(lse: Tensor, final_lse: Tensor) -> Tensor:
    """Return ``exp(lse - final_lse)``: the share of a part in the whole; 0 where either is -inf."""
    empty = (lse == -torch.inf) | (final_lse == -torch.inf)
    return (lse - final_lse).masked_fill_(empty, -torch.inf).exp_()  # masked before exp, so that no gradient is NaN


def gradient_where_keys_are(dlse: Tensor | None, lse: Tensor) -> Tensor | None:
    """The gradient of ``lse``, but 0 for rows without keys, whose lse is -inf whatever goes in.

    A loss of the other rows alone sends NaN to these, if it squares first and selects then: 0 * -inf. Kernels would add
    that to the gradients of all keys of a tile.
    """
    return None if dlse is None else dlse.masked_fill(lse == -torch.inf, 0.0)


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype in which sums over the tensors are kept: float64 if any of them is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
