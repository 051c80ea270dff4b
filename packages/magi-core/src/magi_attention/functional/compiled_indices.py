# SPDX-License-Identifier: Apache-2.0
"""Index attention inside ``torch.compile`` and selective checkpoints: two opaque operators.

What they do is what :func:`magi_attention.functional.index_attention.attend_by_indices` does; the compiler knows of
them nothing but the shapes and data types of the results.
"""

from typing import Any

from torch import Tensor

from magi_attention.common.forward_meta import AttnForwardMeta
from magi_attention.functional.index_job import attend, check_index_call, differentiate, make_index_job
from magi_attention.kernels.opaque import gradients_like, operator, operator_gradients, operator_result, result_like


def attend_by_indices_compiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    sink: Tensor | None,
    sink_layout: str,
    softmax_scale: float | None,
    softcap: float,
    deterministic: bool,
    sm_margin: int,
    return_max_logits: bool,
    backends: tuple[str | None, str | None],
) -> tuple[Tensor, AttnForwardMeta]:
    """:func:`magi_attention.functional.index_attention.attend_by_indices` by opaque operators."""
    options = softmax_scale, softcap, deterministic, sm_margin, *backends
    out, lse, max_logits = _attend(q, k, v, indices, sink, sink_layout, return_max_logits, *options)
    return out, AttnForwardMeta(lse=lse, max_logits=max_logits if return_max_logits else None)


@operator("magi_attention::index_attention")
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    sink: Tensor | None,
    sink_layout: str,
    return_max_logits: bool,
    softmax_scale: float | None,
    softcap: float,
    deterministic: bool,
    sm_margin: int,
    backend: str | None,
    backward_backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_index_call(q, k, v, indices, sink, sink_layout, softmax_scale, softcap, sm_margin)
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
        backends=(backend, backward_backend),
    )
    return operator_result(*attend(q, k, v, sink, job))


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    _indices, _sink, _sink_layout, return_max_logits, *_ = others
    return result_like(q, v, return_max_logits)


@operator("magi_attention::index_attention_backward")
def _differentiate(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    indices: Tensor,
    sink: Tensor | None,
    softmax_scale: float | None,
    softcap: float,
    deterministic: bool,
    sm_margin: int,
    backend: str | None,
    backward_backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    job = make_index_job(
        q,
        k,
        v,
        indices,
        softmax_scale=softmax_scale,
        softcap=softcap,
        deterministic=deterministic,
        sm_margin=sm_margin,
        return_max_logits=False,
        backends=(backend, backward_backend),
    )
    return operator_gradients(*differentiate((q, k, v, out, lse), sink, dout, dlse, job))


@_differentiate.register_fake
def _(dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, ...]:
    _out, _lse, _indices, sink, *_ = others
    return gradients_like(q, k, v, sink)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, indices, sink, _sink_layout, _return_max_logits, *ctx.options = inputs
    out, lse, max_logits = output
    ctx.mark_non_differentiable(max_logits)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse, indices, sink)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    *saved, sink = ctx.saved_tensors
    sink = sink if ctx.needs_input_grad[4] else None
    dq, dk, dv, dsink = _differentiate(dout, dlse, *saved, sink, *ctx.options)
    return dq, dk, dv, None, None if sink is None else dsink, None, None, *[None] * len(ctx.options)


_attend.register_autograd(_backward, setup_context=_save)
