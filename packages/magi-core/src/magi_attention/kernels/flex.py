# SPDX-License-Identifier: Apache-2.0
"""The FlexAttention backend: PyTorch's block-sparse attention, on every GPU that Triton compiles for.

What the mask skips is skipped by tile; partial tiles compare each key with the intervals of its query, read from a
table. Masks with more than eight intervals in some row are computed in layers and merged.

Shape suffixes: t tokens, h heads, d head dim; q queries, k keys.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from magi_attention.common.logsumexp import accumulation_dtype, rescale_weight
from magi_attention.kernels.flex_layer import AttendLayer, attend_compiled
from magi_attention.kernels.flex_tables import BLOCK, layers_of, num_blocks
from magi_attention.kernels.merge import merge_partials
from magi_attention.kernels.protocol import AttentionCall, AttentionRequest, AttentionResult, Support, attend_to_nothing
from magi_attention.utils.triton import has_triton

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIMS = range(16, 257)
MIN_CAPABILITY = (8, 0)

# Forward and backward, 64 query and 8 key heads, 8k tokens; the classes that were not measured take the like of them.
# Scattered blocks are of 64 x 64, 5 % of all pairs of 32k tokens, as FlexAttention itself computes them.
TFLOPS = {
    "full": (441.0, 403.0),
    "causal": (370.0, 329.0),
    "varlen_full": (303.0, 249.0),
    "varlen_causal": (241.0, 185.0),
    "sliding_window": (274.0, 235.0),
    "block_causal": (273.0, 233.0),
    "block_sparse": (180.0, 84.0),
    "general": (241.0, 185.0),
}
FLOAT32_SPEED = 0.05
"""Without tensor cores, relative to half precision."""


class FlexBackend:
    """See :class:`magi_attention.kernels.protocol.KernelBackend`.

    A stage's output and gradients have the inputs' dtype, and float32 where layers were merged or added.

    Args:
        attend: what computes one layer, differentiably; compiled FlexAttention unless a test says otherwise.
    """

    name = "flex"

    def __init__(self, attend: AttendLayer | None = None) -> None:
        self._attend = attend or attend_compiled

    def supports(self, request: AttentionRequest) -> Support:
        """See the protocol."""
        if request.device.type == "cpu":
            return Support(False, "FlexAttention has no backward pass on a CPU; use the backend 'reference'")
        if request.device.type == "meta":
            return Support(False, "a meta tensor has no values to compute with; use the backend 'reference'")
        if request.dtype not in DTYPES:
            return Support(False, f"Triton multiplies no {request.dtype} matrices; use the backend 'reference'")
        if request.head_dim not in HEAD_DIMS or request.head_dim_v not in HEAD_DIMS:
            dims = f"{request.head_dim} and {request.head_dim_v}"
            return Support(False, f"head dims are {dims}, must be {HEAD_DIMS[0]} to {HEAD_DIMS[-1]}")
        if request.max_logits and request.softcap:
            return Support(False, "FlexAttention returns the largest score only after the softcap")
        if not has_triton():
            return Support(False, "triton is not installed: pip install triton")
        if request.device.type == "cuda" and torch.version.hip is None:
            capability = torch.cuda.get_device_capability(request.device)
            if capability < MIN_CAPABILITY:
                return Support(False, f"the GPU has compute capability {capability}, needs at least {MIN_CAPABILITY}")
        return Support(True)

    def expected_tflops(self, request: AttentionRequest) -> float:
        """See the protocol. Measured on one H100, with head dim 128 in bfloat16; taken for other GPUs as well."""
        tflops = TFLOPS[request.mask_class][request.direction == "backward"]
        return tflops * FLOAT32_SPEED if request.dtype == torch.float32 else tflops

    @torch.no_grad()
    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> AttentionResult:
        """See the protocol."""
        num_q = q.shape[0]
        layers = layers_of(call.slices, num_q, k.shape[0], q.device)
        queries, keys, values = _by_block(q), _by_block(k), _by_block(v)
        out, lse, max_logits = attend_to_nothing(q, v, call.max_logits)
        for number, layer in enumerate(layers):
            result = self._attend(queries, keys, values, layer, call.softmax_scale, call.softcap, call.max_logits)
            part, part_lse = _by_token(result.out, num_q), result.lse[:, :num_q].T
            out, lse = merge_partials(out, lse, part, part_lse) if number else (part, part_lse)
            if max_logits is not None and result.max_scores is not None:
                max_logits = torch.maximum(max_logits, result.max_scores[:, :num_q].amax(1))
        return AttentionResult(out, lse, max_logits)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dlse: Tensor | None,
        call: AttentionCall,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See the protocol. The layers' forward pass is computed again: the public API differentiates nothing else.

        FlexAttention differentiates a layer by its own probabilities ``p' = exp(score - lse')``: given the gradients
        ``g`` of its output ``out'`` and ``h`` of its lse, it takes ``dscore = p' * (g·v - rowsum(g * out') + h)``.
        Wanted is ``dscore = p * (dout·v - rowsum(dout * out) + dlse)`` by the final ``p = exp(score - lse) = w * p'``,
        where ``w = exp(lse' - lse)``. Both are equal for ``g = w * dout`` and
        ``h = rowsum(g * out') - w * (rowsum(dout * out) - dlse)``; so are ``dv = p'ᵀ g = pᵀ dout``.
        """
        dtype = accumulation_dtype(q)
        delta = (dout.to(dtype) * out.to(dtype)).sum(-1)
        if dlse is not None:
            delta -= dlse.to(dtype)
        queries, keys, values = inputs = tuple(_by_block(x.detach()).requires_grad_() for x in (q, k, v))
        total: tuple[Tensor, ...] = ()
        for layer in layers_of(call.slices, q.shape[0], k.shape[0], q.device):
            with torch.enable_grad():
                result = self._attend(queries, keys, values, layer, call.softmax_scale, call.softcap, False)
            part, part_lse = _by_token(result.out.detach(), q.shape[0]), result.lse.detach()[:, : q.shape[0]].T
            weight = rescale_weight(part_lse, lse.to(dtype))
            # Rounded to the kernel's dtype first, so that what the kernel subtracts cancels what is added here.
            g = (weight[..., None] * dout.to(dtype)).to(part.dtype)
            h = (g.to(dtype) * part.to(dtype)).sum(-1) - weight * delta
            seeds = (_padded_like(g.transpose(0, 1), result.out), _padded_like(h.T, result.lse))
            gradients = torch.autograd.grad((result.out, result.lse), inputs, seeds)
            total = tuple(a.to(dtype) + b for a, b in zip(total, gradients, strict=True)) if total else gradients
        if not total:
            return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        dq, dk, dv = (_by_token(sum_.flatten(1, 2), len(x)) for sum_, x in zip(total, (q, k, v), strict=True))
        return dq, dk, dv


BACKEND = FlexBackend()


def _by_block(x: Tensor) -> Tensor:
    """``[t, h, d]`` to ``[h, blocks, BLOCK, d]``, padded with zeros; the number of blocks is dynamic to compilers."""
    num_tokens, _, _ = x.shape
    padding = num_blocks(num_tokens) * BLOCK - num_tokens
    padded = F.pad(x, (0, 0, 0, 0, 0, padding)) if padding else x.contiguous()
    return padded.transpose(0, 1).unflatten(1, (-1, BLOCK))


def _by_token(x: Tensor, num_tokens: int) -> Tensor:
    """``[h, rows, d]`` to a contiguous ``[num_tokens, h, d]``, without the padding."""
    return x[:, :num_tokens].transpose(0, 1).contiguous()


def _padded_like(x: Tensor, target: Tensor) -> Tensor:
    """Pad the second dimension of x with zeros to that of ``target``."""
    padding = target.shape[1] - x.shape[1]
    return F.pad(x, (0, 0) * (x.ndim - 2) + (0, padding)).contiguous()
