# SPDX-License-Identifier: Apache-2.0
"""Attention on one device inside ``torch.compile`` and selective checkpoints: two opaque operators.

The slices are integer tensors, and stay so: a compiled program serves any mask. What the operators do is what
:func:`magi_attention.functional.flex_flash_attn_func` does; the compiler knows of them nothing but the shapes and data
types of the results.
"""

from typing import Any

import torch
from torch import Tensor

from magi_attention.common.forward_meta import AttnForwardMeta
from magi_attention.functional.single_device import (
    Job,
    attend,
    check_tensors,
    configured_backends,
    differentiate,
    make_job,
    slices_from_tensors,
)
from magi_attention.functional.utils import check_sink
from magi_attention.kernels.opaque import gradients_like, operator, operator_gradients, operator_result, result_like


def flex_flash_attn_compiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_ranges: Tensor,
    k_ranges: Tensor,
    attn_type_map: Tensor | None,
    sink: Tensor | None,
    sink_layout: str,
    softmax_scale: float | None,
    softcap: float,
    deterministic: bool,
    sm_margin: int,
    return_max_logits: bool,
    skip_overlap_check: bool | None,
) -> tuple[Tensor, AttnForwardMeta]:
    """:func:`magi_attention.functional.flex_flash_attn_func` by opaque operators."""
    options = softmax_scale, softcap, deterministic, sm_margin, return_max_logits, skip_overlap_check
    out, lse, max_logits = _attend(q, k, v, q_ranges, k_ranges, attn_type_map, sink, sink_layout, *options)
    return out, AttnForwardMeta(lse=lse, max_logits=max_logits if return_max_logits else None)


@operator("magi_attention::flex_flash_attn")
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_ranges: Tensor,
    k_ranges: Tensor,
    attn_type_map: Tensor | None,
    sink: Tensor | None,
    sink_layout: str,
    softmax_scale: float | None,
    softcap: float,
    deterministic: bool,
    sm_margin: int,
    return_max_logits: bool,
    skip_overlap_check: bool | None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_tensors(q, k, v)
    if sink is not None:
        check_sink(sink, q.shape[0], q.shape[1], sink_layout)
    options = softmax_scale, softcap, deterministic, sm_margin, return_max_logits, skip_overlap_check
    job = _job(q, k, v, q_ranges, k_ranges, attn_type_map, *options)
    return operator_result(*attend(q, k, v, sink, job))


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, return_max_logits, _skip_overlap_check = others
    return result_like(q, v, return_max_logits)


@operator("magi_attention::flex_flash_attn_backward")
def _differentiate(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_ranges: Tensor,
    k_ranges: Tensor,
    attn_type_map: Tensor | None,
    sink: Tensor | None,
    softmax_scale: float | None,
    softcap: float,
    deterministic: bool,
    sm_margin: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Tensors and mask were checked in the forward pass.
    options = softmax_scale, softcap, deterministic, sm_margin, False, True
    job = _job(q, k, v, q_ranges, k_ranges, attn_type_map, *options)
    return operator_gradients(*differentiate((q, k, v, out, lse), sink, dout, dlse, job))


@_differentiate.register_fake
def _(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, ...]:
    _out, _lse, _q_ranges, _k_ranges, _attn_type_map, sink, *_ = others
    return gradients_like(q, k, v, sink)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, q_ranges, k_ranges, attn_type_map, sink, _sink_layout, *ctx.options = inputs
    out, lse, max_logits = output
    ctx.mark_non_differentiable(max_logits)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse, q_ranges, k_ranges, attn_type_map, sink)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    *saved, sink = ctx.saved_tensors
    dout = torch.zeros_like(saved[3]) if dout is None else dout
    sink = sink if ctx.needs_input_grad[6] else None
    dq, dk, dv, dsink = _differentiate(dout, dlse, *saved, sink, *ctx.options[:4])
    return dq, dk, dv, None, None, None, None if sink is None else dsink, None, *[None] * len(ctx.options)


_attend.register_autograd(_backward, setup_context=_save)


def _job(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_ranges: Tensor,
    k_ranges: Tensor,
    attn_type_map: Tensor | None,
    softmax_scale: float | None,
    softcap: float,
    deterministic: bool,
    sm_margin: int,
    return_max_logits: bool,
    skip_overlap_check: bool | None,
) -> Job:
    return make_job(
        q,
        k,
        v,
        slices_from_tensors(q_ranges, k_ranges, attn_type_map, q.shape[0], k.shape[0], skip_overlap_check),
        softmax_scale=softmax_scale,
        softcap=softcap,
        deterministic=deterministic,
        sm_margin=sm_margin,
        return_max_logits=return_max_logits,
        backends=configured_backends(),
    )
