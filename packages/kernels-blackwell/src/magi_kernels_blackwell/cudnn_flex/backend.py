# SPDX-License-Identifier: Apache-2.0
"""The backend ``cudnn_flex``: block-sparse attention of NVIDIA's cuDNN frontend, on Hopper and Blackwell.

Its kernels take exactly what a mask is here: sorted, disjoint key intervals of every query. A plan on the device, with
tile lists, bit masks of the partial tiles and an order of work, is built once per mask and geometry.

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
from magi_kernels_blackwell.cudnn_flex import launch, library, precompile
from magi_kernels_blackwell.masks import has_pairs
from magi_kernels_blackwell.measured import tflops
from magi_kernels_blackwell.support import DTYPES, gpu_support, refuse
from magi_kernels_blackwell.wheels import CUDNN_FRONTEND, HOPPER, capability_of, missing_wheels

SMALL_DIMS = range(8, 129, 8)
LATENT_DIMS = (192, 128)
"""Head dims of multi-head latent attention: those of queries and keys, and of values."""

LARGE_DIMS = (LATENT_DIMS, (256, 256))


class CudnnFlexBackend:
    """See :class:`magi_attention.kernels.protocol.KernelBackend`. Results have the inputs' dtype."""

    name = "cudnn_flex"

    def supports(self, request: AttentionRequest) -> Support:
        """See the protocol."""
        if (refusal := gpu_support(request, CUDNN_FRONTEND)) is not None:
            return refusal
        return self.supports_on(capability_of(request.device), request)

    def supports_on(self, arch: int, request: AttentionRequest) -> Support:
        """Whether the kernels of an architecture, ``10 * major + minor``, can serve a request; wherever this runs."""
        dims = (request.head_dim, request.head_dim_v)
        if dims not in LARGE_DIMS and not (dims[0] in SMALL_DIMS and dims[1] in SMALL_DIMS):
            return refuse(f"head dims are {dims}, must be multiples of 8 up to 128, or one of {LARGE_DIMS}")
        if request.softcap:
            return refuse("cudnn.flex_attention has no softcap; use the backend 'blackwell'")
        grouped = request.num_heads_q != request.num_heads_kv
        if arch == HOPPER and request.direction == "backward" and dims == LATENT_DIMS and grouped:
            return refuse(f"its backward pass on Hopper has no grouped heads for head dims {dims}; use 'flex'")
        return Support(True)

    def expected_tflops(self, request: AttentionRequest) -> float:
        """See the protocol."""
        return tflops("cudnn_flex", request)

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
        if missing := missing_wheels(tuple(CUDNN_FRONTEND.items())):
            raise RuntimeError(missing)
        return precompile.compile_case(case)

    @torch.no_grad()
    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> AttentionResult:
        """See the protocol."""
        if not has_pairs(call.slices):
            lse = q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
            max_logits = lse.new_full(q.shape[1:2], -torch.inf) if call.max_logits else None
            return AttentionResult(q.new_zeros(*q.shape[:2], v.shape[2]), lse, max_logits)
        with torch.cuda.device(q.device):
            out, lse, max_logits = launch.launch_forward(library.load(q.device), q, k, v, call)
        return AttentionResult(out, lse.T, max_logits)

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
        """See the protocol.

        Raises:
            RuntimeError: For 256 dims on Blackwell, if ``dlse`` is given: those kernels cannot take it.
        """
        if dlse is not None and q.shape[2] == 256 and capability_of(q.device) != HOPPER:
            raise RuntimeError(
                "cudnn.flex_attention cannot differentiate lse for 256 dims on Blackwell; use the backend 'flex'"
            )
        if not has_pairs(call.slices):
            return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        lse = lse.float().T.contiguous()
        dlse = None if dlse is None else dlse.float().T.contiguous()
        dout, out = dout.to(q.dtype), out.to(q.dtype)
        with torch.cuda.device(q.device):
            return launch.launch_backward(library.load(q.device), dout, q, k, v, out, lse, dlse, call)


BACKEND = CudnnFlexBackend()
