# SPDX-License-Identifier: Apache-2.0
"""Softmax, log-sum-exp and sink algebra that is safe where a row has no keys."""

import torch
from torch import Tensor

from magi_attention.common.enum import AttnSinkLayout
from magi_attention.common.errors import MagiValueError
from magi_attention.common.logsumexp import rescale_weight
from magi_attention.kernels.sink import sink_gradient, sink_lse
from magi_attention.utils.tensors import check_plain_tensor


def safe_subtract(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a - b``, with -inf where both are -inf."""
    return torch.where((a == b) & (a == -torch.inf), -torch.inf, a - b)


def safe_lse(x: Tensor, dim: int = -1, keepdim: bool = False) -> Tensor:
    """Return the log-sum-exp of x over ``dim``; -inf, with gradient 0, where all of x is -inf."""
    largest = x.detach().amax(dim, keepdim=True)
    largest = torch.where(largest == -torch.inf, 0.0, largest)
    total = torch.exp(x - largest).sum(dim, keepdim=True)
    empty = total == 0
    lse = (total.masked_fill(empty, 1.0).log() + largest).masked_fill(empty, -torch.inf)
    return lse if keepdim else lse.squeeze(dim)


def safe_softmax(x: Tensor, lse: Tensor | None = None, dim: int = -1) -> Tensor:
    """Return the softmax of x over ``dim``, with zeros where all of x is -inf.

    Args:
        x: scores.
        lse: their log-sum-exp with ``dim`` kept (size 1) or dropped, if it is known.
        dim: the dimension to normalize over.
    """
    if lse is None:
        lse = safe_lse(x, dim, keepdim=True)
    elif lse.ndim < x.ndim:
        lse = lse.unsqueeze(dim)
    return torch.exp(safe_subtract(x, lse))


def softmax_bwd(dout: Tensor, out: Tensor, dim: int = -1) -> Tensor:
    """Return the gradient of a softmax's input, ``out * (dout - sum(dout * out))``, given its output ``out``."""
    return out * (dout - (dout * out).sum(dim, keepdim=True))


def sink_bwd(
    sink: Tensor,
    lse: Tensor,
    o: Tensor,
    do: Tensor,
    sink_layout: AttnSinkLayout = "sh",
    dsink: Tensor | None = None,
) -> Tensor:
    """Return the gradient of the attention sink, ``-exp(sink - lse) * rowsum(do * o)``, for "sh" summed over the rows.

    Args:
        sink: ``[s, hq]`` ("sh") or ``[tq, s, hq]`` ("ssh").
        lse: ``[tq, hq]``, the sink included.
        o: ``[tq, hq, dv]``, the sink included.
        do: ``[tq, hq, dv]``, the gradient of o.
        sink_layout: "sh" or "ssh".
        dsink: if given, the gradient is written into it, and it is returned.
    """
    check_sink(sink, lse.shape[0], lse.shape[1], sink_layout)
    gradient = sink_gradient(sink, o, do, lse, None).to(sink.dtype)
    return gradient if dsink is None else dsink.copy_(gradient)


def calc_lse_sink(sink: Tensor, seqlen_q: int, sink_layout: AttnSinkLayout = "sh") -> Tensor:
    """Return the log-sum-exp ``[seqlen_q, hq]`` of the sink alone, in at least float32."""
    check_sink(sink, seqlen_q, sink.shape[-1], sink_layout)
    return sink_lse(sink, seqlen_q)


def calc_lse_rescale_weight(lse_to_rescale: Tensor, rescaled_lse: Tensor) -> Tensor:
    """Return ``exp(lse_to_rescale - rescaled_lse)[..., None]``, the factor on an output; 0 where both are -inf."""
    return rescale_weight(lse_to_rescale, rescaled_lse)[..., None]


def check_sink(sink: Tensor, num_q: int, num_heads_q: int, sink_layout: str) -> None:
    """Raise if ``sink`` is not shaped as its layout says for ``num_q`` queries of ``num_heads_q`` heads."""
    check_plain_tensor("sink", sink)
    if sink_layout == "shd":
        raise NotImplementedError("sink_layout 'shd' is not implemented; use 'sh' or 'ssh'")
    if sink_layout not in ("sh", "ssh"):
        raise MagiValueError(f"sink_layout must be 'sh' or 'ssh', got {sink_layout!r}")
    expected = (num_heads_q,) if sink_layout == "sh" else (num_q, num_heads_q)
    rest = tuple(sink.shape[:-2]) + tuple(sink.shape[-1:])
    if sink.ndim != len(sink_layout) or rest != expected:
        wanted = "[s, hq]" if sink_layout == "sh" else "[tq, s, hq]"
        raise MagiValueError(
            f"a sink of layout {sink_layout!r} must have shape {wanted} with tq={num_q} and hq={num_heads_q}, "
            f"got {list(sink.shape)}"
        )
    if not sink.is_floating_point():
        raise MagiValueError(f"the sink must hold floating point numbers, got {sink.dtype}")
