# SPDX-License-Identifier: Apache-2.0
"""Attention of every query to keys of its own, as one differentiable operation.

Shape suffixes: t tokens, h heads, d head dim, n entries of a list; q queries, k keys.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from magi_attention.common.enum import AttnSinkLayout
from magi_attention.common.errors import MagiTypeError, MagiValueError
from magi_attention.common.forward_meta import AttnForwardMeta
from magi_attention.common.validation import check_scores, check_sm_margin
from magi_attention.functional.single_device import check_tensors
from magi_attention.functional.utils import check_sink
from magi_attention.kernels.autograd import only_once_differentiable, owned, without_autocast
from magi_attention.kernels.indexed import attend_to_indices, differentiate_by_indices
from magi_attention.kernels.protocol import AttentionRequest, IndexCall, attend_to_nothing
from magi_attention.kernels.registry import IndexBackends, choose_for_indices
from magi_attention.kernels.sink import fold_sink, sink_gradient


@torch._disable_dynamo  # torch.compiler.disable would import the compiler at once
def attend_by_indices(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    *,
    sink: Tensor | None = None,
    sink_layout: AttnSinkLayout = "sh",
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_max_logits: bool = False,
    backend: str = "auto",
    backward_backend: str = "same",
) -> tuple[Tensor, AttnForwardMeta]:
    """Attend each query ``q[t]`` to the keys ``indices[t]``.

    Gradients flow from out and lse to q, k, v and sink.

    Args:
        q: ``[tq, hq, d]``.
        k: ``[tk, hk, d]``.
        v: ``[tk, hk, dv]``.
        indices: ``[tq, hk, n]`` integers, rows of k and v; with one key head also ``[tq / m, m, n]``, the lists of m
            neighboring rows of q side by side. A list ends at its first negative entry.
        sink: ``[s, hq]`` (layout "sh") or ``[tq, s, hq]`` ("ssh").
        sink_layout: "sh" or "ssh".
        softmax_scale: ``d ** -0.5`` if None.
        softcap: of scores, 0 for none.
        deterministic: the same bits in every run, in the backward pass too; otherwise a kernel may add up what queries
            give to the gradients of a key as it comes.
        sm_margin: multiprocessors to leave to others, where a kernel can.
        return_max_logits: whether to return the largest score of every head.
        backend: a name as :func:`magi_attention.kernels.registry.choose_backend` takes it. Where its backend has no
            kernel for this, plain torch serves the call.
        backward_backend: the same for the backward pass; ``same`` for ``backend``.

    Raises:
        ValueError: If shapes do not fit, a number cannot be right, or, on CPU tensors, an index is not below tk. On a
            GPU, where looking would wait for the device, such an index is an error of the device, as in torch's own
            indexing.
        TypeError: If indices or sm_margin are not integers.
    """
    check_tensors(q, k, v)
    if sink is not None:
        check_sink(sink, q.shape[0], q.shape[1], sink_layout)
    check_scores(softmax_scale, softcap)
    check_sm_margin(sm_margin)
    request = AttentionRequest.of_tensors(q, k, v, softcap=softcap, max_logits=return_max_logits)
    call = IndexCall(
        indices=_checked(indices, q, k),
        softmax_scale=q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale,
        softcap=softcap,
        max_logits=return_max_logits,
        sm_margin=sm_margin,
        deterministic=deterministic,
    )
    job = _Job(choose_for_indices(request, backend, backward_backend), call)
    out, lse, max_logits = _IndexAttention.apply(q, k, v, sink, job)
    return out, AttnForwardMeta(lse=lse, max_logits=max_logits)


@dataclass(frozen=True)
class _Job:
    """One call, and the backends that have kernels for it."""

    backends: IndexBackends
    call: IndexCall


def _checked(indices: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Return the indices as ``[tq, hk, n]``, int32 and contiguous."""
    integers = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    if not isinstance(indices, Tensor) or indices.dtype not in integers:
        given = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise MagiTypeError(f"index_attn_indices must be a tensor of integers, got {given}")
    num_q, num_kv_heads = q.shape[0], k.shape[1]
    fits = indices.ndim == 3 and (
        indices.shape[:2] == (num_q, num_kv_heads)
        or (num_kv_heads == 1 and indices.shape[0] * indices.shape[1] == num_q)
    )
    if not fits:
        raise MagiValueError(
            f"index_attn_indices must have shape [tq, hk, n] = [{num_q}, {num_kv_heads}, n], got {list(indices.shape)}"
        )
    if indices.device != q.device:
        raise MagiValueError(f"index_attn_indices must be where q is, on {q.device}, not on {indices.device}")
    if not indices.is_cuda and indices.numel() and int(indices.max()) >= len(k):
        raise MagiValueError(f"index_attn_indices has {int(indices.max())}, but k has {len(k)} rows")
    if indices.dtype == torch.int64:  # what int32 cannot hold is beyond k, and shall be noticed as such
        indices = indices.clamp(-1, 2**31 - 1)
    return indices.to(torch.int32).reshape(num_q, num_kv_heads, indices.shape[2]).contiguous()


class _IndexAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, job: _Job
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        with without_autocast(q):
            if 0 in (len(q), len(k), job.call.indices.shape[2]):
                out, lse, max_logits = attend_to_nothing(q, v, job.call.max_logits)
            else:
                backend = job.backends.forward
                run = attend_to_indices if backend is None else backend.forward_indices
                out, lse, max_logits = run(q, k, v, job.call)
            if sink is not None:
                lse = fold_sink(out, lse, sink)
        out, lse = owned(out.to(q.dtype)), owned(lse)
        ctx.job = job
        ctx.set_materialize_grads(False)
        # Saved, so that autograd notices if the caller writes the next lists over them.
        ctx.save_for_backward(q, k, v, out, lse, sink, job.call.indices)
        if max_logits is not None:
            ctx.mark_non_differentiable(max_logits)
        return out, lse, max_logits

    @staticmethod
    @only_once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, sink, _indices = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        call, backend = ctx.job.call, ctx.job.backends.backward
        with without_autocast(q):
            if 0 in (len(q), len(k), call.indices.shape[2]):
                gradients = tuple(torch.zeros_like(x) for x in (q, k, v))
            else:
                run = differentiate_by_indices if backend is None else backend.backward_indices
                gradients = run(dout, q, k, v, out, lse, dlse, call)
            dsink = None
            if sink is not None and ctx.needs_input_grad[3]:
                dsink = sink_gradient(sink, out, dout, lse, dlse).to(sink.dtype)
        return *(gradient.to(q.dtype) for gradient in gradients), dsink, None
