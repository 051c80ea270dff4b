# SPDX-License-Identifier: Apache-2.0
"""One forward or backward pass by the kernels of cudnn.flex_attention. All tensors belong to the caller.

Shape suffixes: t tokens, h heads, d head dim; q queries, k keys.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from magi_attention.common.slices import SliceTable
from magi_attention.kernels.protocol import AttentionCall
from magi_kernels_blackwell.cudnn_flex.library import Library, quiet
from magi_kernels_blackwell.cudnn_flex.tables import row_functions
from magi_kernels_blackwell.masks import intervals_of_queries

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
            table = row_functions(intervals_of_queries(slices, batch[0].shape[1]))
            functions = torch.from_numpy(table).to(batch[0].device)
            self._plan = library.create_mask_plan(functions, *batch, build_backward=backward)
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
    batch = [library.aligned(x, ALIGN_BYTES).unsqueeze(0) for x in (q, k, v)]
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2]) if into is None else into
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    max_logits = lse.new_empty(q.shape[1]) if call.max_logits else None
    with quiet(library):
        plan = mask_plan(library, call.slices, batch, backward=False)
        prepared = library.dispatch._prepare_flex_attn_fwd(
            *batch,
            pack_gqa=plan.metadata.pack_gqa,
            block_sparse_tensors=plan._packed_plan,
            has_lse=True,
            has_max_logit=call.max_logits,
        )
        # The Hopper kernel takes its number of blocks at launch; the others take all multiprocessors.
        prepared = replace(prepared, num_sms=max(prepared.num_sms - call.sm_margin, 1))
        counter = torch.empty(1, dtype=torch.int32, device=q.device) if prepared.arch == 90 else None
        tensors = (*batch, out.unsqueeze(0), lse.unsqueeze(0), call.softmax_scale, None, None, counter, max_logits)
        kernel = library.dispatch._compile_flex_attn_fwd(prepared, *tensors)
        library.dispatch._launch_flex_attn_fwd(prepared, kernel, *tensors)
    return out, lse, max_logits


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
    """
    align_bytes = ALIGN_BYTES_256_DIMS if q.shape[2] == v.shape[2] == 256 else ALIGN_BYTES
    batch = [library.aligned(x, align_bytes).unsqueeze(0) for x in (q, k, v)]
    with quiet(library):
        plan = mask_plan(library, call.slices, batch, backward=True)
        gradients = library.dispatch._flex_attn_bwd(
            *batch,
            out.unsqueeze(0),
            dout.unsqueeze(0),
            lse.unsqueeze(0),
            softmax_scale=call.softmax_scale,
            deterministic=call.deterministic,
            block_sparse_tensors=plan._backward_runtime_args(call.deterministic)[0],
            dlse=None if dlse is None else dlse.unsqueeze(0),
        )
    dq, dk, dv = (gradient.squeeze(0) for gradient in gradients)
    return dq, dk, dv
