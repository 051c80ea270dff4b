# SPDX-License-Identifier: Apache-2.0
"""What a call of index attention must fulfill, what computes it, and its two passes.

Shape suffixes: t tokens, h heads, d head dim, n entries of a list; q queries, k keys.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from magi_attention.common.errors import MagiTypeError, MagiValueError
from magi_attention.common.logsumexp import gradient_where_keys_are
from magi_attention.common.validation import check_scores, check_sm_margin
from magi_attention.functional.single_device import check_tensors, configured_backends
from magi_attention.functional.utils import check_sink
from magi_attention.kernels.autograd import without_autocast
from magi_attention.kernels.indexed import attend_to_indices, differentiate_by_indices
from magi_attention.kernels.protocol import AttentionRequest, AttentionResult, IndexCall, attend_to_nothing
from magi_attention.kernels.registry import IndexBackends, choose_for_indices
from magi_attention.kernels.sink import fold_sink, sink_gradient


@dataclass(frozen=True)
class IndexJob:
    """One call, and the backends that have kernels for it."""

    backends: IndexBackends
    call: IndexCall


def check_index_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    sink: Tensor | None,
    sink_layout: str,
    softmax_scale: float | None,
    softcap: float,
    sm_margin: int,
) -> None:
    """Raise what :func:`magi_attention.functional.index_attention.attend_by_indices` says about its arguments."""
    check_tensors(q, k, v)
    if sink is not None:
        check_sink(sink, q.shape[0], q.shape[1], sink_layout)
    check_scores(softmax_scale, softcap)
    check_sm_margin(sm_margin)
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
    has_values = indices.device.type == "cpu" and not isinstance(indices, FakeTensor)
    if has_values and indices.numel() and int(indices.max()) >= len(k):
        raise MagiValueError(f"index_attn_indices has {int(indices.max())}, but k has {len(k)} rows")


def make_index_job(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    *,
    softmax_scale: float | None,
    softcap: float,
    deterministic: bool,
    sm_margin: int,
    return_max_logits: bool,
    backends: tuple[str | None, str | None],
) -> IndexJob:
    """Choose what computes a call that :func:`check_index_call` has passed.

    ``backends`` are the two names that :func:`magi_attention.kernels.registry.choose_for_indices` takes, each None for
    the one that the environment asks for.
    """
    backend, backward_backend = (
        asked if given is None else given for given, asked in zip(backends, configured_backends(), strict=True)
    )
    if indices.dtype == torch.int64:  # what int32 cannot hold is beyond k, and shall be noticed as such
        indices = indices.clamp(-1, 2**31 - 1)
    call = IndexCall(
        indices=indices.to(torch.int32).reshape(q.shape[0], k.shape[1], indices.shape[2]).contiguous(),
        softmax_scale=q.shape[2] ** -0.5 if softmax_scale is None else float(softmax_scale),
        softcap=float(softcap),
        max_logits=return_max_logits,
        sm_margin=sm_margin,
        deterministic=deterministic,
    )
    request = AttentionRequest.of_tensors(q, k, v, softcap=softcap, max_logits=return_max_logits)
    return IndexJob(choose_for_indices(request, backend, backward_backend), call)


def attend(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, job: IndexJob) -> AttentionResult:
    """Compute out in q's dtype, lse and max_logits."""
    with without_autocast(q):
        if 0 in (len(q), len(k), job.call.indices.shape[2]):
            out, lse, max_logits = attend_to_nothing(q, v, job.call.max_logits)
        else:
            backend = job.backends.forward
            run = attend_to_indices if backend is None else backend.forward_indices
            out, lse, max_logits = run(q, k, v, job.call)
        if sink is not None:
            lse = fold_sink(out, lse, sink)
    return AttentionResult(out.to(q.dtype), lse, max_logits)


def differentiate(
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    sink: Tensor | None,
    dout: Tensor | None,
    dlse: Tensor | None,
    job: IndexJob,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of q, k, v and sink, given q, k, v, out and lse of the forward pass."""
    q, k, v, out, lse = saved
    dout = torch.zeros_like(out) if dout is None else dout
    dlse = gradient_where_keys_are(dlse, lse)
    call, backend = job.call, job.backends.backward
    with without_autocast(q):
        if 0 in (len(q), len(k), call.indices.shape[2]):
            dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        else:
            run = differentiate_by_indices if backend is None else backend.backward_indices
            dq, dk, dv = (gradient.to(q.dtype) for gradient in run(dout, q, k, v, out, lse, dlse, call))
        dsink = None if sink is None else sink_gradient(sink, out, dout, lse, dlse).to(sink.dtype)
    return dq, dk, dv, dsink
