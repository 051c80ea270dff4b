# SPDX-License-Identifier: Apache-2.0
"""Distributed attention as one differentiable operation."""

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from magi_attention.common.forward_meta import AttnForwardMeta
from magi_attention.common.logsumexp import gradient_where_keys_are
from magi_attention.kernels.autograd import (
    KernelFunction,
    on_real_memory,
    only_once_differentiable,
    owned,
    without_autocast,
)
from magi_attention.kernels.sink import sink_gradient
from magi_attention.runtime.backward import SavedAttention, differentiate
from magi_attention.runtime.forward import attend
from magi_attention.runtime.job import AttentionJob, DistAttnRuntime
from magi_attention.utils.dtypes import as_dtype

_COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


def dist_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dist_attn_runtime: DistAttnRuntime,
    sink: Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    return_max_logits: bool = False,
) -> tuple[Tensor, AttnForwardMeta]:
    """Attend local queries to the keys of all ranks. Every rank of the group must call it.

    Args:
        q: ``[n_local, hq, d]``.
        k: ``[n_local, hk, d]``, with hq a multiple of hk.
        v: ``[n_local, hk, dv]``.
        dist_attn_runtime: the rank's plan and collectives.
        sink: ``[s_sink, hq]`` learnable logits, the same on all ranks; each joins every row's softmax with value 0.
        softmax_scale: factor on q·k; ``d ** -0.5`` by default.
        softcap: if positive, scores become ``softcap * tanh(score / softcap)``.
        return_max_logits: also return the largest scaled, uncapped score per head over the whole group.

    Returns:
        ``out`` ``[n_local, hq, dv]`` in q's dtype, and its ``lse`` ``[n_local, hq]`` and ``max_logits`` ``[hq]``.
        Gradients flow from ``out`` and ``lse`` to q, k, v and sink.
    """
    dtype = compute_dtype(dist_attn_runtime.options.precision, q.dtype)
    given = q.dtype
    if given != dtype:
        q, k, v = (x.to(dtype) for x in (q, k, v))
    job = dist_attn_runtime.job_for(q, k, v, softmax_scale, softcap, return_max_logits)
    # Here, since gradients are never enabled inside.
    keeps_received = job.keeps_received and torch.is_grad_enabled()
    out, lse, max_logits = _DistributedAttention.apply(q, k, v, sink, job, keeps_received)
    return as_dtype(out, given), AttnForwardMeta(lse=lse, max_logits=max_logits)


def compute_dtype(precision: str | None, given: torch.dtype) -> torch.dtype:
    """The data type to compute in, for the configuration's ``precision`` and the dtype of the tensors."""
    return _COMPUTE_DTYPES.get(precision or "input", given)


def differentiate_with_sink(
    job: AttentionJob, saved: SavedAttention, sink: Tensor | None, dout: Tensor | None, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of this rank's q, k and v, and of the sink, if it is given."""
    dout = torch.zeros_like(saved.out) if dout is None else dout
    dsink = None
    dlse = gradient_where_keys_are(dlse, saved.lse)
    with without_autocast(dout):
        dq, dk, dv = differentiate(job, saved, dout, dlse)
        if sink is not None:
            dsink = sink_gradient(sink, saved.out, dout, saved.lse, dlse)
            dsink = _reduce_sink_gradient(job, dsink).to(sink.dtype)
    return dq, dk, dv, dsink


class _DistributedAttention(KernelFunction):
    @staticmethod
    @on_real_memory
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, job: AttentionJob, keeps_received: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        kept: list[Tensor] | None = [] if keeps_received and any(ctx.needs_input_grad) else None
        with without_autocast(q):
            out, lse, max_logits = attend(job, q, k, v, sink, kept)
        out, lse = owned(out), owned(lse)
        ctx.job = job
        ctx.set_materialize_grads(False)
        ctx.keeps_received = kept is not None
        ctx.save_for_backward(q, k, v, out, lse, sink, *(kept or ()))
        if max_logits is not None:
            ctx.mark_non_differentiable(max_logits)
        return out, lse, max_logits

    @staticmethod
    @only_once_differentiable
    @on_real_memory
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        q, k, v, out, lse, sink, *kept = ctx.saved_tensors
        saved = SavedAttention(q, k, v, out, lse, kept if ctx.keeps_received else None)
        sink = sink if ctx.needs_input_grad[3] else None
        return *differentiate_with_sink(ctx.job, saved, sink, dout, dlse), None, None


_warned_about_sink = False


def _reduce_sink_gradient(job: AttentionJob, dsink: Tensor) -> Tensor:
    """The sink is replicated: add up what the ranks found, or leave that to the caller with a warning."""
    global _warned_about_sink
    if job.num_ranks == 1:
        return dsink
    op = job.options.sink_grad_reduce
    if op == "none":
        if not _warned_about_sink:
            _warned_about_sink = True
            warnings.warn(
                "the gradient of the attention sink covers this rank's rows only, as those of all parameters do. That "
                "is right where DDP or FSDP, say, reduces all of them over the context-parallel group; where nothing "
                "reduces the sink's, set RuntimeConfig(sink_grad_reduce='sum')",
                stacklevel=2,
            )
        return dsink
    dist.all_reduce(dsink, group=job.group)
    return dsink / job.num_ranks if op == "avg" else dsink
