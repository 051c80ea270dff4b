# SPDX-License-Identifier: Apache-2.0
"""Attention of every query to keys of its own, as one differentiable operation.

Shape suffixes: t tokens, h heads, d head dim, n entries of a list; q queries, k keys.
"""

from typing import Any

import torch
from torch import Tensor

from magi_attention.common.enum import AttnSinkLayout
from magi_attention.common.forward_meta import AttnForwardMeta
from magi_attention.functional.compiled_indices import attend_by_indices_compiled
from magi_attention.functional.index_job import IndexJob, attend, check_index_call, differentiate, make_index_job
from magi_attention.kernels.autograd import KernelFunction, on_real_memory, only_once_differentiable, owned
from magi_attention.utils.torch_modes import is_one_operator


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
    backend: str | None = "auto",
    backward_backend: str | None = "same",
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
            kernel for this, plain torch serves the call. None for what ``MAGI_ATTENTION_KERNEL_BACKEND`` says.
        backward_backend: the same for the backward pass; ``same`` for ``backend``, and None for what
            ``MAGI_ATTENTION_KERNEL_BACKEND_BACKWARD`` says.

    Raises:
        ValueError: If shapes do not fit, a number cannot be right, or, on CPU tensors, an index is not below tk. On a
            GPU, where looking would wait for the device, such an index is an error of the device, as in torch's own
            indexing.
        TypeError: If indices or sm_margin are not integers.
    """
    backends = backend, backward_backend
    is_compiling = torch.compiler.is_compiling()
    if not is_compiling:
        check_index_call(q, k, v, indices, sink, sink_layout, softmax_scale, softcap, sm_margin)
    if is_compiling or is_one_operator(q):
        options = softmax_scale, softcap, deterministic, sm_margin, return_max_logits, backends
        return attend_by_indices_compiled(q, k, v, indices, sink, sink_layout, *options)
    job = make_index_job(
        q,
        k,
        v,
        indices,
        softmax_scale=softmax_scale,
        softcap=softcap,
        deterministic=deterministic,
        sm_margin=sm_margin,
        return_max_logits=return_max_logits,
        backends=backends,
    )
    out, lse, max_logits = _IndexAttention.apply(q, k, v, sink, job)
    return out, AttnForwardMeta(lse=lse, max_logits=max_logits)


class _IndexAttention(KernelFunction):
    @staticmethod
    @on_real_memory
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, job: IndexJob
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        out, lse, max_logits = attend(q, k, v, sink, job)
        out, lse = owned(out), owned(lse)
        ctx.job = job
        ctx.set_materialize_grads(False)
        # Saved, so that autograd notices if the caller writes the next lists over them.
        ctx.save_for_backward(q, k, v, out, lse, sink, job.call.indices)
        if max_logits is not None:
            ctx.mark_non_differentiable(max_logits)
        return out, lse, max_logits

    @staticmethod
    @only_once_differentiable
    @on_real_memory
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        *saved, sink, _indices = ctx.saved_tensors
        return *differentiate(tuple(saved), sink if ctx.needs_input_grad[3] else None, dout, dlse, ctx.job), None
