# SPDX-License-Identifier: Apache-2.0
"""The attention sink: learnable logits of extra keys whose values are zero, folded into finished results.

A sink is ``[s, hq]`` (layout "sh": the same for every query) or ``[tq, s, hq]`` (layout "ssh"). It is neither scaled
nor capped.
"""

import torch
from torch import Tensor

from magi_attention.common.logsumexp import accumulation_dtype, merge_lse, rescale_weight
from magi_attention.kernels.merge import rescale


def sink_lse(sink: Tensor, num_q: int) -> Tensor:
    """Return the sink's own log-sum-exp ``[num_q, hq]``, in at least float32."""
    return torch.logsumexp(sink.to(accumulation_dtype(sink)), dim=-2).expand(num_q, -1)


def lse_with_sink(lse: Tensor, sink: Tensor) -> Tensor:
    """Return ``logaddexp(lse, logsumexp(sink))`` for lse ``[tq, hq]``, in its own precision, at least float32."""
    lse = lse.to(accumulation_dtype(lse))
    return merge_lse(lse, sink_lse(sink.to(lse.dtype), lse.shape[0]))


def apply_sink(out: Tensor, lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """Fold ``sink`` into the final ``out`` ``[tq, hq, dv]`` and ``lse`` ``[tq, hq]`` of an attention without it.

    ``lse' = logaddexp(lse, logsumexp(sink))`` and ``out' = exp(lse - lse') * out``. A row without keys keeps the output
    0 and gets the sink's lse.

    Returns:
        out and lse in at least float32. The arguments are not changed.
    """
    with_sink = lse_with_sink(lse, sink)
    return rescale(out, lse, with_sink), with_sink


def fold_sink(out: Tensor, lse: Tensor, sink: Tensor) -> Tensor:
    """:func:`apply_sink` in place of ``out``, rounded once to its dtype: out is read and written once.

    Returns:
        the lse with the sink, as :func:`lse_with_sink` makes it; the argument is not changed.
    """
    with_sink = lse_with_sink(lse, sink)
    out.mul_(rescale_weight(lse.to(with_sink.dtype), with_sink)[..., None])
    return with_sink


def sink_gradient(sink: Tensor, out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None) -> Tensor:
    """Differentiate an attention by its sink.

    The sink's keys have value zero, so with ``p = exp(sink - lse)`` the gradient of a score,
    ``p * (dout·v - rowsum(dout * out) + dlse)``, leaves ``p * (dlse - rowsum(dout * out))``; layout "sh" sums it over
    the rows.

    Args:
        sink: ``[s, hq]`` or ``[tq, s, hq]``.
        out, dout: ``[tq, hq, dv]``, the final output, sink included, and its gradient.
        lse, dlse: ``[tq, hq]``, the final lse, sink included, and its gradient (None for 0).

    Returns:
        The gradient, of the sink's shape, in at least float32.
    """
    dtype = accumulation_dtype(sink, out, lse)
    row = -(dout.to(dtype) * out.to(dtype)).sum(-1)
    if dlse is not None:
        row += dlse.to(dtype)
    gradient = rescale_weight(sink.to(dtype), lse.to(dtype)[:, None]) * row[:, None]
    return gradient if sink.ndim == 3 else gradient.sum(0)
