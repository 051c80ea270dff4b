# SPDX-License-Identifier: Apache-2.0
"""The backend ``blackwell`` (also called ``fa4``): FlashAttention-4's kernels on Hopper and Blackwell.

Masks that the kernels know themselves (packed documents, full, causal or with a sliding window) run natively. All
others run block-sparse, each row's or column's intervals read from a table.

Shape suffixes: t tokens, h heads, d head dim; q queries, k keys.
"""

from torch import Tensor

from magi_attention.kernels.protocol import AttentionCall, AttentionRequest, KeysDone, PrecompileCase, Support
from magi_kernels_blackwell.backend import LATENT_DIMS, WheelBackend
from magi_kernels_blackwell.fa4 import launch, library, precompile
from magi_kernels_blackwell.prepared import ignore
from magi_kernels_blackwell.support import refuse
from magi_kernels_blackwell.wheels import FLASH_ATTENTION, HOPPER, capability_of

SQUARE_DIMS = (64, 96, 128, 192, 256)


class FlashAttention4Backend(WheelBackend):
    """See :class:`WheelBackend`."""

    name = "blackwell"
    wheels = FLASH_ATTENTION
    variable_prefix = library.VARIABLE_PREFIX
    measured_as = "fa4"
    variants = precompile.VARIANTS

    def supports_on(self, arch: int, request: AttentionRequest) -> Support:
        """Whether the kernels of an architecture, ``10 * major + minor``, can serve a request; wherever this runs."""
        dims, backward = (request.head_dim, request.head_dim_v), request.direction == "backward"
        if request.max_logits:
            return refuse("FlashAttention-4 returns no max_logits; use the backend 'cudnn_flex'")
        square = dims[0] == dims[1] and dims[0] in SQUARE_DIMS
        if dims != LATENT_DIMS and not square:
            return refuse(f"head dims are {dims[0]} and {dims[1]}, must be equal, of {SQUARE_DIMS}, or {LATENT_DIMS}")
        if arch == HOPPER:
            if backward and request.deterministic:
                return refuse("its block-sparse backward pass on Hopper is not deterministic; use 'cudnn_flex'")
            return Support(True)
        if dims == (192, 192):
            return refuse("FlashAttention-4 has no kernels for 192 dims of values on Blackwell; use the backend 'flex'")
        if backward and dims == (256, 256):
            return refuse("its backward pass for 256 dims on Blackwell is not block-sparse; use 'cudnn_flex'")
        return Support(True)

    def compile_case(self, case: PrecompileCase) -> bool:
        """See :class:`WheelBackend`."""
        return precompile.compile_case(case)

    def launch_forward(
        self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, into: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See :class:`WheelBackend`."""
        return *launch.launch_forward(library.load(q.device), capability_of(q.device), q, k, v, call, into), None

    def launch_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dlse: Tensor | None,
        call: AttentionCall,
        into: Tensor | None = None,
        keys_done: KeysDone = ignore,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`WheelBackend`."""
        loaded, arch = library.load(q.device), capability_of(q.device)
        return launch.launch_backward(loaded, arch, dout, q, k, v, out, lse, dlse, call, into, keys_done)


BACKEND = FlashAttention4Backend()
