# SPDX-License-Identifier: Apache-2.0
"""Distributed attention inside ``torch.compile`` and selective checkpoints: operators that name the key by its handle.

A compiled program holds tensors and numbers only. What the operators do is what :func:`dist_attn_func` does; the
compiler knows of them nothing but the shapes and data types of the results.
"""

from typing import Any

import torch
from torch import Tensor

from magi_attention.api.attention_checks import check_attention_call
from magi_attention.common.forward_meta import AttnForwardMeta
from magi_attention.kernels.autograd import without_autocast
from magi_attention.kernels.opaque import gradients_like, operator, operator_gradients, operator_result, result_like
from magi_attention.runtime.autograd import compute_dtype, differentiate_with_sink
from magi_attention.runtime.backward import SavedAttention
from magi_attention.runtime.cache import find_manager
from magi_attention.runtime.forward import attend
from magi_attention.runtime.key import DistAttnRuntimeKey, key_of_handle


def calc_attn_compiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key: DistAttnRuntimeKey,
    sink: Tensor | None,
    softmax_scale: float | None,
    softcap: float,
    return_max_logits: bool,
) -> tuple[Tensor, AttnForwardMeta]:
    """:func:`magi_attention.runtime.autograd.dist_attn_func` by opaque operators."""
    inputs = [x.to(compute_dtype(key.precision, x.dtype)) for x in (q, k, v)]
    out, lse, max_logits = _attend(*inputs, sink, key.handle, softmax_scale, softcap, return_max_logits)
    return out.to(q.dtype), AttnForwardMeta(lse=lse, max_logits=max_logits if return_max_logits else None)


@operator("magi_attention::calc_attn")
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    handle: int,
    softmax_scale: float | None,
    softcap: float,
    return_max_logits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    manager = find_manager(key_of_handle(handle))
    check_attention_call(q, k, v, manager, sink, softmax_scale, softcap, return_max_logits)
    job = manager.dist_attn_runtime.job_for(q, k, v, softmax_scale, softcap, return_max_logits)
    with without_autocast(q):
        return operator_result(*attend(job, q, k, v, sink))


@_attend.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    handle: int,
    softmax_scale: float | None,
    softcap: float,
    return_max_logits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return result_like(q, v, return_max_logits)


@operator("magi_attention::calc_attn_backward")
def _differentiate(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sink: Tensor | None,
    handle: int,
    softmax_scale: float | None,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    runtime = find_manager(key_of_handle(handle), becomes_most_recent=False).dist_attn_runtime
    job = runtime.job_for(q, k, v, softmax_scale, softcap, False)
    return operator_gradients(*differentiate_with_sink(job, SavedAttention(q, k, v, out, lse), sink, dout, dlse))


@_differentiate.register_fake
def _(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, ...]:
    _out, _lse, sink, *_ = others
    return gradients_like(q, k, v, sink)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, sink, ctx.handle, ctx.softmax_scale, ctx.softcap, _ = inputs
    out, lse, max_logits = output
    ctx.mark_non_differentiable(max_logits)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse, sink)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    *saved, sink = ctx.saved_tensors
    dout = torch.zeros_like(saved[3]) if dout is None else dout
    sink = sink if ctx.needs_input_grad[3] else None
    dq, dk, dv, dsink = _differentiate(dout, dlse, *saved, sink, ctx.handle, ctx.softmax_scale, ctx.softcap)
    return dq, dk, dv, None if sink is None else dsink, None, None, None, None


_attend.register_autograd(_backward, setup_context=_save)
