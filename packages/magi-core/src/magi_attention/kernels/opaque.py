# SPDX-License-Identifier: Apache-2.0
"""Operators that a compiler does not look into; results of those of attention, and tensors that only have their shapes.

Such operators return tensors alone, never None, contiguous, and with the dtypes that the shapes' twins promise.
"""

from functools import partial

import torch
from torch import Tensor

from magi_attention.common.logsumexp import accumulation_dtype

# Makes an operator of a function, which a compiler captures in none of its CUDA graphs: what it launches is decided by
# the mask, and by what is kept with this, which may be another in the next call. Native collectives could not be
# captured at all.
operator = partial(torch.library.custom_op, mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))


def operator_result(out: Tensor, lse: Tensor, max_logits: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Out, lse and max_logits as an operator returns them; no max_logits are an empty tensor."""
    return out.contiguous(), lse.contiguous(), lse.new_empty(0) if max_logits is None else max_logits.to(lse.dtype)


def result_like(q: Tensor, v: Tensor, has_max_logits: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The shapes of :func:`operator_result` for q ``[tq, hq, d]`` and v ``[tk, hk, dv]``."""
    lse = q.new_empty(q.shape[:2], dtype=accumulation_dtype(q))
    return q.new_empty(*q.shape[:2], v.shape[2]), lse, lse.new_empty(q.shape[1] if has_max_logits else 0)


def operator_gradients(
    dq: Tensor, dk: Tensor, dv: Tensor, dsink: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients as an operator returns them; no gradient of the sink is an empty tensor."""
    return dq.contiguous(), dk.contiguous(), dv.contiguous(), dq.new_empty(0) if dsink is None else dsink.contiguous()


def gradients_like(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The shapes of :func:`operator_gradients`."""
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv, q.new_empty(0) if sink is None else sink.new_empty(sink.shape)
