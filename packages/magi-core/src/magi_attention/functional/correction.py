# SPDX-License-Identifier: Apache-2.0
"""Correcting finished attention results by more keys or by a sink.

Everything is computed in at least float32 and returned in the dtype of the first argument of its kind, or, with
``inplace=True``, written into that argument. Gradients flow to all arguments, unless it is in place.
"""

from torch import Tensor

from magi_attention.common.enum import AttnSinkLayout
from magi_attention.common.errors import MagiValueError
from magi_attention.common.logsumexp import merge_lse
from magi_attention.functional.utils import check_sink
from magi_attention.kernels.merge import merge_partials, rescale
from magi_attention.kernels.sink import apply_sink, lse_with_sink


def correct_attn_lse(lse1: Tensor, lse2: Tensor, inplace: bool = False) -> Tensor:
    """Return ``logaddexp(lse1, lse2)``; -inf with -inf stays -inf. Both ``[tq, hq]``, of one dtype."""
    _check_same_dtype("lse1", lse1, "lse2", lse2)
    return _deliver(merge_lse(lse1, lse2), lse1, inplace)


def correct_attn_out(
    out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor, lse: Tensor, inplace: bool = False
) -> Tensor:
    """Return ``exp(lse1 - lse) * out1 + exp(lse2 - lse) * out2``, where a weight of -inf with -inf is 0.

    Args:
        out1, out2: ``[tq, hq, dv]`` partial outputs over disjoint keys.
        lse1, lse2: ``[tq, hq]``, their log-sum-exps.
        lse: ``[tq, hq]``, that of both together, as :func:`correct_attn_lse` returns it.
        inplace: whether to write the result into ``out1``.
    """
    _check_same_dtype("out1", out1, "out2", out2)
    return _deliver(rescale(out1, lse1, lse) + rescale(out2, lse2, lse), out1, inplace)


def correct_attn_out_lse(
    out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    """Return out and lse of both parts together: :func:`correct_attn_out` and :func:`correct_attn_lse` at once."""
    _check_same_dtype("out1", out1, "out2", out2)
    _check_same_dtype("lse1", lse1, "lse2", lse2)
    out, lse = merge_partials(out1, lse1, out2, lse2)
    return _deliver(out, out1, inplace), _deliver(lse, lse1, inplace)


def correct_attn_lse_with_sink(
    lse: Tensor, sink: Tensor, sink_layout: AttnSinkLayout = "sh", inplace: bool = False
) -> Tensor:
    """Return ``logaddexp(lse, logsumexp(sink))``, for lse ``[tq, hq]`` and a sink ``[s, hq]`` or ``[tq, s, hq]``."""
    check_sink(sink, lse.shape[0], lse.shape[1], sink_layout)
    return _deliver(lse_with_sink(lse, sink), lse, inplace)


def correct_attn_out_with_sink(
    out: Tensor, lse: Tensor, sink: Tensor, sink_layout: AttnSinkLayout = "sh", inplace: bool = False
) -> Tensor:
    """Return out ``[tq, hq, dv]`` scaled by ``exp(lse - lse')``; lse is that before, lse' that after the sink."""
    check_sink(sink, lse.shape[0], lse.shape[1], sink_layout)
    return _deliver(apply_sink(out, lse, sink)[0], out, inplace)


def correct_attn_out_lse_with_sink(
    out: Tensor, lse: Tensor, sink: Tensor, sink_layout: AttnSinkLayout = "sh", inplace: bool = False
) -> tuple[Tensor, Tensor]:
    """Return out and lse with the sink folded in."""
    check_sink(sink, lse.shape[0], lse.shape[1], sink_layout)
    final_out, final_lse = apply_sink(out, lse, sink)
    return _deliver(final_out, out, inplace), _deliver(final_lse, lse, inplace)


def _deliver(result: Tensor, target: Tensor, inplace: bool) -> Tensor:
    return target.copy_(result) if inplace else result.to(target.dtype)


def _check_same_dtype(name: str, tensor: Tensor, name2: str, tensor2: Tensor) -> None:
    if tensor.dtype != tensor2.dtype:
        raise MagiValueError(f"{name} and {name2} must have the same dtype, got {tensor.dtype} and {tensor2.dtype}")
