# SPDX-License-Identifier: Apache-2.0
"""One forward or backward pass by the kernels of cudnn.flex_attention. All tensors belong to the caller.

Shape suffixes: t tokens, h heads, d head dim; q queries, k keys.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from magi_attention.common.slices import SliceTable
from magi_attention.kernels.protocol import AttentionCall, KeysDone
from magi_attention.kernels.table_streams import settle
from magi_kernels_blackwell.cudnn_flex.library import Library, quiet
from magi_kernels_blackwell.cudnn_flex.tables import row_functions
from magi_kernels_blackwell.masks import intervals_of_queries
from magi_kernels_blackwell.prepared import (
    Launch,
    PreparedBackward,
    PreparedForward,
    check_sums,
    direct,
    ignore,
    layout_of,
    noted,
    watched,
)
from magi_kernels_blackwell.wheels import HOPPER

SCALE_AT = 6
DLSE_AT, SEMAPHORES_AT = 7, (12, 13, 14)
"""Places among the arguments of the kernels."""

COUNTER_AT = 3
"""The place, after the scale, of the Hopper forward kernel's counter of work; its number of blocks follows."""

ALIGN_BYTES = 16
ALIGN_BYTES_256_DIMS = 128
"""What the backward kernels for 256 dims need."""


class MaskPlans:
    """The device plan of a mask for tensors of one geometry, extended by the backward pass when that is first run."""

    def __init__(self) -> None:
        self._plan: Any = None

    def get(self, library: Library, slices: SliceTable, batch: list[Tensor], *, backward: bool) -> Any:
        """Return the plan for ``batch``: q, k, v as ``[1, t, h, d]``. A plan with the backward pass serves both."""
        if self._plan is None or backward > self._plan.metadata.has_backward:
            functions = row_functions(intervals_of_queries(slices, batch[0].shape[1]), batch[0].device)
            self._plan = library.create_mask_plan(functions, *batch, build_backward=backward)
            settle(functions.device)
        return self._plan


def mask_plan(library: Library, slices: SliceTable, batch: list[Tensor], *, backward: bool) -> Any:
    """Return the plan of a mask for ``batch``. Built once for each geometry and kept with the slices."""
    q, k, v = batch
    key = ("cudnn flex plan", q.device, q.dtype, q.shape, k.shape, v.shape)
    return slices.derived(key, MaskPlans).get(library, slices, batch, backward=backward)


def launch_forward(
    library: Library, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, into: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return out ``[tq, hq, dv]``, lse ``[hq, tq]`` and, if asked for, max_logits ``[hq]``.

    Args:
        library: the loaded wheel.
        q: ``[tq, hq, d]``, not empty.
        k: ``[tk, hk, d]``, not empty.
        v: ``[tk, hk, dv]``.
        call: the mask and how to score.
        into: where to write out; None for a new tensor.
    """
    q, k, v = batch = [library.aligned(x, ALIGN_BYTES).unsqueeze(0) for x in (q, k, v)]
    out = q.new_empty(*q.shape[:3], v.shape[3]) if into is None else into.unsqueeze(0)
    lse = q.new_empty(1, q.shape[2], q.shape[1], dtype=torch.float32)
    max_logits = lse.new_full(q.shape[2:3], -torch.inf) if call.max_logits else None
    key = ("cudnn flex forward", call.max_logits, *layout_of(*batch))
    prepared = call.slices.derived(key, lambda: _prepare_forward(library, batch, out, lse, max_logits, call))
    if prepared is not None:
        rest = prepared.rest
        if len(rest) > COUNTER_AT:  # on Hopper, where the kernel takes its blocks' number, and hands out work itself
            counter = lse.new_zeros(1, dtype=torch.int32)
            num_sms = max(rest[COUNTER_AT + 1] - call.sm_margin, 1)
            rest = (*rest[:COUNTER_AT], counter, num_sms)
        prepared.streams.add_current()
        prepared.kernel(*batch, out, lse, max_logits, call.softmax_scale, *rest)
    return out.squeeze(0), lse.squeeze(0), max_logits


def _prepare_forward(
    library: Library,
    batch: list[Tensor],
    out: Tensor,
    lse: Tensor,
    max_logits: Tensor | None,
    call: AttentionCall,
) -> PreparedForward | None:
    """Find the kernel for tensors as they are given to it; None where it is only compiled."""
    dispatch = library.dispatch
    with quiet(library):
        plan = mask_plan(library, call.slices, batch, backward=False)
        prepared = dispatch._prepare_flex_attn_fwd(
            *batch,
            pack_gqa=plan.metadata.pack_gqa,
            block_sparse_tensors=plan._packed_plan,
            has_lse=True,
            has_max_logit=call.max_logits,
        )
        counter = torch.empty(1, dtype=torch.int32, device=out.device) if prepared.arch == HOPPER else None
        tensors = (*batch, out, lse, call.softmax_scale, None, None, counter, max_logits)
        # The function launches what it is given, so that its cache need not be watched. It must not: a kernel that has
        # just been compiled does not come from there.
        kernel = direct(dispatch._compile_flex_attn_fwd(prepared, *tensors))
        launches: list[Launch] = []
        dispatch._launch_flex_attn_fwd(prepared, lambda *each: launches.append(Launch(kernel, each)), *tensors)
    if not noted(launches, is_tracing=dispatch.is_fake_mode()):
        return None
    return PreparedForward.of_launch(launches[-1], SCALE_AT)


def launch_backward(
    library: Library,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    call: AttentionCall,
    keys_done: KeysDone = ignore,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``dq, dk, dv``.

    Args:
        library: the loaded wheel.
        dout, out: ``[tq, hq, dv]``, of q's dtype.
        q: ``[tq, hq, d]``, not empty.
        k: ``[tk, hk, d]``, not empty.
        v: ``[tk, hk, dv]``.
        lse, dlse: ``[hq, tq]`` float32, contiguous.
        call: the mask and how to score.
        keys_done: called with dk and dv once they are launched.
    """
    align_bytes = ALIGN_BYTES_256_DIMS if q.shape[2] == v.shape[2] == 256 else ALIGN_BYTES
    tensors = [library.aligned(x, align_bytes).unsqueeze(0) for x in (dout, q, k, v, out)]
    gradients = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors[1:4])
    lse, dlse = lse.unsqueeze(0), None if dlse is None else dlse.unsqueeze(0)
    key = ("cudnn flex backward", call.deterministic, dlse is None, *layout_of(*tensors))
    prepared = call.slices.derived(key, lambda: _prepare_backward(library, tensors, lse, dlse, gradients, call))
    dq, dk, dv = (gradient.squeeze(0) for gradient in gradients)
    if prepared is not None:
        prepared(tensors, lse, dlse, gradients, call.softmax_scale, partial(keys_done, dk, dv))
    return dq, dk, dv


def _prepare_backward(
    library: Library,
    tensors: list[Tensor],
    lse: Tensor,
    dlse: Tensor | None,
    gradients: tuple[Tensor, ...],
    call: AttentionCall,
) -> PreparedBackward | None:
    """Find the kernels for tensors as they are given to them; None where they are only compiled."""
    dispatch = library.dispatch
    dout, *batch, out = tensors
    parts = (dispatch._bwd_preprocess, dispatch._flex_attn_bwd, dispatch._bwd_postprocess_convert)
    with quiet(library), watched(*parts) as (before, main, after):
        plan = mask_plan(library, call.slices, batch, backward=True)
        dispatch._flex_attn_bwd(
            *batch,
            out,
            dout,
            lse,
            softmax_scale=call.softmax_scale,
            deterministic=call.deterministic,
            block_sparse_tensors=plan._backward_runtime_args(call.deterministic)[0],
            dlse=dlse,
            _compile_outputs=gradients,
        )
    if not noted(main, is_tracing=dispatch.is_fake_mode()):
        return None
    check_sums(main[0], after, gradients)
    # Kernels for 256 dims on Blackwell have none, and a list of tiles in their first place.
    semaphores = [at for at in SEMAPHORES_AT if main[0].arguments[at] is None or torch.is_tensor(main[0].arguments[at])]
    return PreparedBackward(before[0], main[0], after, DLSE_AT, semaphores)
