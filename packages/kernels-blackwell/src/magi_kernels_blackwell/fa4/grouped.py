# SPDX-License-Identifier: Apache-2.0
"""One backward pass on Hopper by :mod:`magi_kernels_blackwell.fa4.grouped_kernel`.

Shape suffixes: t tokens, h heads, d head dim; q queries, k keys.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from magi_attention.kernels.protocol import AttentionCall, KeysDone
from magi_kernels_blackwell.fa4.library import Library
from magi_kernels_blackwell.fa4.tables import grouped_tiling, run_tables
from magi_kernels_blackwell.prepared import ignore

MOST_ELEMENTS = 2**31 - 1
"""How large a group's sum of dq can be: the kernel counts its elements in 32 bits."""


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
    keys_done: KeysDone = ignore,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``dq, dk, dv``, on Hopper; the sums of dq are in no fixed order.

    Arguments are those of :func:`magi_kernels_blackwell.fa4.launch.launch_backward`, aligned as the library wants.
    Groups of many heads over very many tokens are computed in parts.
    """
    (num_q, heads_q, dim), (num_k, heads_k, dim_v) = q.shape, v.shape
    tiling = grouped_tiling(dim)
    rows = -(-num_q // tiling.block_q) * tiling.block_q
    heads = _heads_at_once(heads_q // heads_k, rows * dim)
    if heads * heads_k < heads_q:
        launch = partial(launch_grouped_backward, library, arch, call=call)
        dq, dk, dv = _launch_in_parts(launch, (dout, q, k, v, out, lse, dlse), into, heads)
        keys_done(dk, dv)
        return dq, dk, dv
    tables = run_tables(call.slices, num_q, num_k, heads_k, tiling, q.device)
    grouped = library.grouped
    geometry = grouped.Geometry(q.dtype, dim, dim_v, heads_q // heads_k, tiling.block_q, call.softcap)
    kernels = grouped.kernels(geometry, dlse is not None)
    lse2, dpsum = q.new_empty(2, 1, heads_q, rows, dtype=torch.float32).unbind()
    dq_sum = lse2.new_empty(1, heads_q, rows * dim)
    dq, dk, dv = gradients_like(q, k, v, into)
    if library.is_tracing():
        return dq, dk, dv
    q, k, v, dout, out = (_without_broadcast(x).unsqueeze(0) for x in (q, k, v, dout, out))
    dlse = None if dlse is None else dlse.unsqueeze(0)
    before = (out, dout, dpsum, lse.unsqueeze(0), lse2, dq_sum, None, None, dlse, None, None, 1.0, None, None)
    tables.streams.add_current()
    kernels.before(*before)
    by_group = (x.view(1, heads_k, -1) for x in (lse2, dpsum, dq_sum))
    tensors = (q, k, v, dout, *by_group, dk.unsqueeze(0), dv.unsqueeze(0))
    kernels.main(*grouped.arguments(tensors, call.softmax_scale, tables[6:], grouped.Runs(*tables[1:6])))
    keys_done(dk, dv)
    kernels.after(dq_sum, dq.unsqueeze(0), call.softmax_scale, None, None, None, None)
    return dq, dk, dv


def _heads_at_once(group: int, elements: int) -> int:
    """The most heads that divide a group and whose sums of dq, of so many elements each, are not too large.

    Raises:
        RuntimeError: If those of a single head are.
    """
    if elements > MOST_ELEMENTS:
        raise RuntimeError(
            "backend 'blackwell': its backward pass on Hopper counts elements of a head's gradient of q in 32 bits, "
            f"{elements:,} are too many: use more GPUs, or the backend 'hopper'"
        )
    return next(each for each in range(group, 0, -1) if group % each == 0 and each * elements <= MOST_ELEMENTS)


def _launch_in_parts(
    launch: Callable[..., tuple[Tensor, Tensor, Tensor]],
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None],
    into: Tensor | None,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute so many heads of a group at a time, and add up their gradients of its keys and values.

    ``launch(*tensors, into=dq)`` takes the tensors of :func:`launch_grouped_backward`, of these heads, and writes dq.
    """
    dout, q, k, v, out, lse, dlse = tensors
    dq, dk, dv = gradients_like(q, k, v, into)
    group = q.shape[1] // k.shape[1]
    for head in range(k.shape[1]):
        of_head = k[:, head : head + 1], v[:, head : head + 1]
        sums = [torch.zeros_like(x, dtype=torch.float32) for x in of_head]
        for first in range(head * group, (head + 1) * group, heads):
            at = slice(first, first + heads)
            part_dlse = None if dlse is None else dlse[at]
            _, *parts = launch(dout[:, at], q[:, at], *of_head, out[:, at], lse[at], part_dlse, into=dq[:, at])
            for total, part in zip(sums, parts, strict=True):
                total += part
        dk[:, head], dv[:, head] = (total[:, 0] for total in sums)
    return dq, dk, dv


def gradients_like(q: Tensor, k: Tensor, v: Tensor, dq: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """New tensors for the gradients of q, k and v, or the one that is given."""
    return q.new_empty(q.shape) if dq is None else dq, k.new_empty(k.shape), v.new_empty(v.shape)


def _without_broadcast(x: Tensor) -> Tensor:
    """Return a tensor whose elements lie apart, as the kernel is compiled for."""
    return x.contiguous() if 0 in x.stride() else x
