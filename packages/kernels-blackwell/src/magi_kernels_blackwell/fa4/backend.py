# SPDX-License-Identifier: Apache-2.0
"""The backend ``blackwell`` (also called ``fa4``): FlashAttention-4's kernels on Hopper and Blackwell.

Masks that the kernels know themselves (packed documents, full, causal or with a sliding window) run natively. All
others run block-sparse, each row's or column's intervals read from a table.

Shape suffixes: t tokens, h heads, d head dim; q queries, k keys.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from magi_attention.kernels.protocol import (
    AttentionCall,
    AttentionRequest,
    AttentionResult,
    KernelSelection,
    PrecompileCase,
    Support,
)
from magi_kernels_blackwell.cases import arch_number, combinations, request_of
from magi_kernels_blackwell.fa4 import launch, library, precompile
from magi_kernels_blackwell.masks import has_pairs
from magi_kernels_blackwell.measured import tflops
from magi_kernels_blackwell.support import DTYPES, gpu_support, refuse
from magi_kernels_blackwell.wheels import FLASH_ATTENTION, HOPPER, capability_of, missing_wheels

SQUARE_DIMS = (64, 96, 128, 192, 256)
LATENT_DIMS = (192, 128)
"""Head dims of multi-head latent attention: those of queries and keys, and of values."""


class FlashAttention4Backend:
    """See :class:`magi_attention.kernels.protocol.KernelBackend`. Results have the inputs' dtype."""

    name = "blackwell"

    def supports(self, request: AttentionRequest) -> Support:
        """See the protocol."""
        if (refusal := gpu_support(request, FLASH_ATTENTION)) is not None:
            return refusal
        return self.supports_on(capability_of(request.device), request)

    def supports_on(self, arch: int, request: AttentionRequest) -> Support:
        """Whether the kernels of an architecture, ``10 * major + minor``, can serve a request; wherever this runs."""
        dims, backward = (request.head_dim, request.head_dim_v), request.direction == "backward"
        grouped = request.num_heads_q != request.num_heads_kv
        if request.max_logits:
            return refuse("FlashAttention-4 returns no max_logits; use the backend 'cudnn_flex'")
        square = dims[0] == dims[1] and dims[0] in SQUARE_DIMS
        if dims != LATENT_DIMS and not square:
            return refuse(f"head dims are {dims[0]} and {dims[1]}, must be equal, of {SQUARE_DIMS}, or {LATENT_DIMS}")
        if arch == HOPPER:
            if backward and request.deterministic:
                return refuse("its block-sparse backward pass on Hopper is not deterministic; use 'cudnn_flex'")
            if backward and dims == LATENT_DIMS and grouped:
                return refuse(f"its backward pass on Hopper has no grouped heads for head dims {dims}; use 'flex'")
            return Support(True)
        if dims == (192, 192):
            return refuse("FlashAttention-4 has no kernels for 192 dims of values on Blackwell; use the backend 'flex'")
        if backward and dims == (256, 256):
            return refuse("its backward pass for 256 dims on Blackwell is not block-sparse; use 'cudnn_flex'")
        return Support(True)

    def expected_tflops(self, request: AttentionRequest) -> float:
        """See the protocol."""
        return tflops("fa4", request)

    def precompile_cases(self, selection: KernelSelection) -> Sequence[PrecompileCase]:
        """See :class:`magi_attention.kernels.protocol.Precompiles`."""
        arch = arch_number(selection.arch)
        return [
            case
            for case in combinations(selection, precompile.VARIANTS)
            if case.dtype in DTYPES
            and self.supports_on(arch, request_of(case))
            and not ("deterministic" in case.variant and case.direction == "forward")
        ]

    def precompile(self, case: PrecompileCase) -> bool:
        """See :class:`magi_attention.kernels.protocol.Precompiles`.

        Raises:
            RuntimeError: If a wheel is missing.
        """
        if missing := missing_wheels(tuple(FLASH_ATTENTION.items())):
            raise RuntimeError(missing)
        return precompile.compile_case(case)

    @torch.no_grad()
    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> AttentionResult:
        """See the protocol."""
        if not has_pairs(call.slices):
            lse = q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
            return AttentionResult(q.new_zeros(*q.shape[:2], v.shape[2]), lse)
        with torch.cuda.device(q.device):
            out, lse = launch.launch_forward(library.load(q.device), capability_of(q.device), q, k, v, call)
        return AttentionResult(out, lse.T)

    @torch.no_grad()
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
        """See the protocol."""
        if not has_pairs(call.slices):
            return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        lse = lse.float().T.contiguous()
        dlse = None if dlse is None else dlse.float().T.contiguous()
        with torch.cuda.device(q.device):
            return launch.launch_backward(
                library.load(q.device),
                capability_of(q.device),
                dout.to(q.dtype),
                q,
                k,
                v,
                out.to(q.dtype),
                lse,
                dlse,
                call,
            )


BACKEND = FlashAttention4Backend()
