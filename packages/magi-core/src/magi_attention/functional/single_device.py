# SPDX-License-Identifier: Apache-2.0
"""Attention on one device as one differentiable operation over any kernel backend.

Shape suffixes: t tokens, h heads, d head dim; q queries, k keys; s sinks.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from magi_attention.common.errors import MagiTypeError, MagiValueError
from magi_attention.common.forward_meta import AttnForwardMeta
from magi_attention.common.logsumexp import gradient_where_keys_are
from magi_attention.common.slices import SliceTable, find_double_cover
from magi_attention.common.validation import check_scores, check_sm_margin
from magi_attention.env import general as environment
from magi_attention.kernels.autograd import (
    KernelFunction,
    on_real_memory,
    only_once_differentiable,
    owned,
    without_autocast,
)
from magi_attention.kernels.protocol import AttentionCall, AttentionRequest
from magi_attention.kernels.registry import BackendPair, backends_for_slices
from magi_attention.kernels.sink import fold_sink, sink_gradient
from magi_attention.utils.tensors import check_plain_tensor
from magi_attention.utils.torch_modes import outside_inference_mode

# Masks whose tables are kept, so that a loop over a few masks derives nothing twice.
NUM_CACHED_MASKS = 32


@dataclass(frozen=True)
class Job:
    """One call: what computes it, and what the backends are told."""

    backends: BackendPair
    call: AttentionCall


def make_job(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slices: SliceTable,
    *,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_max_logits: bool = False,
    backends: tuple[str, str],
) -> Job:
    """Check a call's options and choose its backends.

    q ``[tq, hq, d]``, k ``[tk, hk, d]`` and v ``[tk, hk, dv]`` are what :func:`check_tensors` has passed. The options
    are those of :class:`magi_attention.kernels.protocol.AttentionCall`; ``backends`` are the two names that
    :func:`magi_attention.kernels.registry.choose_backends` takes.
    """
    check_scores(softmax_scale, softcap)
    check_sm_margin(sm_margin)
    request = AttentionRequest.of_tensors(
        q, k, v, softcap=softcap, max_logits=return_max_logits, deterministic=deterministic
    )
    call = AttentionCall(
        slices=slices,
        softmax_scale=q.shape[2] ** -0.5 if softmax_scale is None else float(softmax_scale),
        softcap=float(softcap),
        deterministic=deterministic,
        max_logits=return_max_logits,
        sm_margin=sm_margin,
    )
    return Job(backends_for_slices(slices, request, *backends), call)


def attend_on_one_device(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, job: Job
) -> tuple[Tensor, AttnForwardMeta]:
    """Attend as the job says, which is of tensors like these. Gradients flow from out and lse to q, k, v and sink."""
    out, lse, max_logits = _Attention.apply(q, k, v, sink, job)
    return out, AttnForwardMeta(lse=lse, max_logits=max_logits)


@outside_inference_mode
def attend(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, job: Job) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute out in q's dtype, lse and max_logits. The whole call is a single stage, final but for the sink."""
    with without_autocast(q):
        out, lse, max_logits = job.backends.forward.forward(q, k, v, job.call)
        if sink is not None:
            lse = fold_sink(out, lse, sink)
    return out.to(q.dtype), lse, max_logits


def differentiate(
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    sink: Tensor | None,
    dout: Tensor | None,
    dlse: Tensor | None,
    job: Job,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of q, k, v and sink, given q, k, v, out and lse of the forward pass."""
    q, k, v, out, lse = saved
    dout = torch.zeros_like(out, dtype=q.dtype) if dout is None else dout
    dlse = gradient_where_keys_are(dlse, lse)
    with without_autocast(q):
        gradients = job.backends.backward.backward(dout, q, k, v, out, lse, dlse, job.call)
        dq, dk, dv = (gradient.to(q.dtype) for gradient in gradients)
        dsink = None if sink is None else sink_gradient(sink, out, dout, lse, dlse).to(sink.dtype)
    return dq, dk, dv, dsink


class _Attention(KernelFunction):
    @staticmethod
    @on_real_memory
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, job: Job
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        out, lse, max_logits = attend(q, k, v, sink, job)
        out, lse = owned(out), owned(lse)
        ctx.job = job
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse, sink)
        if max_logits is not None:
            ctx.mark_non_differentiable(max_logits)
        return out, lse, max_logits

    @staticmethod
    @only_once_differentiable
    @on_real_memory
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        *saved, sink = ctx.saved_tensors
        return *differentiate(tuple(saved), sink if ctx.needs_input_grad[3] else None, dout, dlse, ctx.job), None


def configured_backends() -> tuple[str, str]:
    """The names of the backends that the environment asks for, of both passes and of the backward pass alone."""
    backend = environment.kernel_backend()
    # The two SDPA backends were only ever meant for `calc_attn`.
    return "auto" if backend in ("sdpa", "sdpa_ol") else backend, environment.kernel_backend_backward()


def slices_from_tensors(
    q_ranges: Tensor,
    k_ranges: Tensor,
    attn_type_map: Tensor | None,
    num_q: int,
    num_k: int,
    skip_overlap_check: bool | None = None,
) -> SliceTable:
    """Build the slice table from integer tensors on any device; tables of recent masks are reused.

    Args:
        q_ranges: ``[n, 2]``, ``(start, end)`` of queries.
        k_ranges: ``[n, 2]``, ``(start, end)`` of keys.
        attn_type_map: ``[n]`` integers of :class:`magi_attention.common.enum.AttnMaskType`; all FULL if None.
        num_q: how many queries there are.
        num_k: how many keys there are.
        skip_overlap_check: whether to leave out the check that no pair is covered twice; by default what
            ``MAGI_ATTENTION_SKIP_OVERLAP_CHECK`` says.

    Raises:
        ValueError: If shapes do not match, a range is reversed or out of bounds, a type is unknown, or two slices keep
            a common pair.
        TypeError: If an argument is not a tensor of integers.
    """
    ranges = [_host_integers("q_ranges", q_ranges, 2), _host_integers("k_ranges", k_ranges, 2)]
    count = len(ranges[0])
    kind = np.zeros(count, np.int64) if attn_type_map is None else _host_integers("attn_type_map", attn_type_map, 1)
    if not count == len(ranges[1]) == len(kind):
        lengths = f"{count}, {len(ranges[1])} and {len(kind)}"
        raise MagiValueError(f"q_ranges, k_ranges and attn_type_map must be of equal length, got {lengths}")
    for name, bounds, limit in (("q_ranges", ranges[0], num_q), ("k_ranges", ranges[1], num_k)):
        wrong = (bounds[:, 0] < 0) | (bounds[:, 0] > bounds[:, 1]) | (bounds[:, 1] > limit)
        if wrong.any():
            slot = int(wrong.argmax())
            given = bounds[slot].tolist()
            raise MagiValueError(f"{name}[{slot}] is {given}, must be an ascending range inside [0, {limit}]")
    if count and not 0 <= kind.min() <= kind.max() <= 3:
        raise MagiValueError(f"attn_type_map must hold integers from 0 to 3, got {kind.min()} to {kind.max()}")
    if skip_overlap_check is None:
        skip_overlap_check = environment.is_overlap_check_skipped()
    table = _cached_table(np.column_stack([*ranges, kind]).tobytes())
    if not skip_overlap_check:
        _check_cover(table)
    return table


@lru_cache(maxsize=NUM_CACHED_MASKS)
def _cached_table(rows: bytes) -> SliceTable:
    return SliceTable(np.frombuffer(rows, np.int64).reshape(-1, 5))


def _check_cover(table: SliceTable) -> None:
    """Raise if two slices keep a common pair; looked for once, and kept with the table."""
    doubled = table.derived("double cover", lambda: find_double_cover(table))
    if doubled is not None:
        first, second = (f"{slot} {table.rows[slot].tolist()}" for slot in doubled)
        raise MagiValueError(
            f"the slices {first} and {second} (q start, q end, k start, k end, type) keep a common (query, key) pair; "
            "every pair may be covered by one slice only"
        )


def _host_integers(name: str, tensor: Tensor, ndim: int) -> NDArray[np.int64]:
    if not isinstance(tensor, Tensor) or tensor.is_floating_point() or tensor.is_complex():
        given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise MagiTypeError(f"{name} must be a tensor of integers, got {given}")
    if tensor.ndim != ndim or (ndim == 2 and tensor.shape[1] != 2):
        raise MagiValueError(f"{name} must have shape {'[n, 2]' if ndim == 2 else '[n]'}, got {list(tensor.shape)}")
    return tensor.detach().cpu().numpy().astype(np.int64)


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise if q, k and v are not what one attention on one device takes."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_plain_tensor(name, tensor)
        if not tensor.is_floating_point():
            raise MagiTypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
        if tensor.ndim != 3:
            raise MagiValueError(f"{name} must have shape [tokens, heads, head_dim], got {list(tensor.shape)}")
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise MagiValueError(
                f"q, k and v must have one dtype and device, got q {q.dtype} on {q.device} and {name} {tensor.dtype} "
                f"on {tensor.device}"
            )
    if k.shape[:2] != v.shape[:2] or q.shape[2] != k.shape[2]:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in (q, k, v))
        raise MagiValueError(f"shapes must be [tq, hq, d], [tk, hk, d] and [tk, hk, dv], got {shapes}")
    if 0 in (q.shape[1], q.shape[2], v.shape[2]):
        shapes = ", ".join(str(list(tensor.shape)) for tensor in (q, k, v))
        raise MagiValueError(f"there must be heads, and of a size, got {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise MagiValueError(f"the query heads must be a multiple of the key heads, got {q.shape[1]} and {k.shape[1]}")
