# SPDX-License-Identifier: Apache-2.0
"""One backward pass on Hopper by :mod:`magi_kernels_blackwell.fa4.grouped_kernel`.

Shape suffixes: t tokens, h heads, d head dim; q queries, k keys.
"""

import torch
from torch import Tensor

from magi_attention.kernels.protocol import AttentionCall
from magi_kernels_blackwell.fa4.library import Library
from magi_kernels_blackwell.fa4.tables import grouped_tiling, run_tables


def launch_grouped_backward(
    library: Library,
    arch: int,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    call: AttentionCall,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``dq, dk, dv``, on Hopper; the sums of dq are in no fixed order.

    Arguments are those of :func:`magi_kernels_blackwell.fa4.launch.launch_backward`, aligned as the library wants.
    """
    (num_q, heads_q, dim), (num_k, heads_k, dim_v) = q.shape, v.shape
    tiling = grouped_tiling(dim)
    tables = run_tables(call.slices, num_q, num_k, heads_k, tiling, q.device)
    grouped = library.grouped
    geometry = grouped.Geometry(q.dtype, dim, dim_v, heads_q // heads_k, tiling.block_q, call.softcap)
    kernels = grouped.kernels(geometry, dlse is not None)
    rows = -(-num_q // tiling.block_q) * tiling.block_q
    lse2, dpsum = q.new_empty(2, 1, heads_q, rows, dtype=torch.float32).unbind()
    dq_sum = lse2.new_empty(1, heads_q, rows * dim)
    dq, dk, dv = gradients_like(q, k, v, into)
    if library.is_tracing():
        return dq, dk, dv
    q, k, v, dout, out = (_without_broadcast(x).unsqueeze(0) for x in (q, k, v, dout, out))
    dlse = None if dlse is None else dlse.unsqueeze(0)
    before = (out, dout, dpsum, lse.unsqueeze(0), lse2, dq_sum, None, None, dlse, None, None, 1.0, None, None)
    kernels.before(*before)
    by_group = (x.view(1, heads_k, -1) for x in (lse2, dpsum, dq_sum))
    tensors = (q, k, v, dout, *by_group, dk.unsqueeze(0), dv.unsqueeze(0))
    kernels.main(*grouped.arguments(tensors, call.softmax_scale, tables[5:], grouped.Runs(*tables[:5])))
    kernels.after(dq_sum, dq.unsqueeze(0), call.softmax_scale, None, None, None, None)
    return dq, dk, dv


def gradients_like(q: Tensor, k: Tensor, v: Tensor, dq: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """New tensors for the gradients of q, k and v, or the one that is given."""
    return q.new_empty(q.shape) if dq is None else dq, k.new_empty(k.shape), v.new_empty(v.shape)


def _without_broadcast(x: Tensor) -> Tensor:
    """Return a tensor whose elements lie apart, as the kernel is compiled for."""
    return x.contiguous() if 0 in x.stride() else x
