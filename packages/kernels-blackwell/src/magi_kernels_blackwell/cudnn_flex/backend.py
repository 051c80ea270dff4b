# SPDX-License-Identifier: Apache-2.0
"""The backend ``cudnn_flex``: block-sparse attention of NVIDIA's cuDNN frontend, on Hopper and Blackwell.

Its kernels take exactly what a mask is here: sorted, disjoint key intervals of every query. A plan on the device, with
tile lists, bit masks of the partial tiles and an order of work, is built once per mask and geometry.

Shape suffixes: t tokens, h heads, d head dim; q queries, k keys.
"""

from torch import Tensor

from magi_attention.kernels.protocol import AttentionCall, AttentionRequest, KeysDone, PrecompileCase, Support
from magi_kernels_blackwell.backend import LATENT_DIMS, WheelBackend
from magi_kernels_blackwell.cudnn_flex import launch, library, precompile
from magi_kernels_blackwell.prepared import ignore
from magi_kernels_blackwell.support import refuse
from magi_kernels_blackwell.wheels import CUDNN_FRONTEND, HOPPER, capability_of

SMALL_DIMS = range(8, 129, 8)
LARGE_DIMS = (LATENT_DIMS, (256, 256))

TALL_TILE_DIMS = (56, 64)
MOST_TALL_TILE_DIM_V = 96
"""On Hopper, the backward pass has tiles of 128 queries up to 64 dims, of 64 beyond: these need the most memory."""


class CudnnFlexBackend(WheelBackend):
    """See :class:`WheelBackend`."""

    name = "cudnn_flex"
    wheels = CUDNN_FRONTEND
    variable_prefix = library.VARIABLE_PREFIX
    measured_as = "cudnn_flex"
    variants = precompile.VARIANTS

    def supports_on(self, arch: int, request: AttentionRequest) -> Support:
        """Whether the kernels of an architecture, ``10 * major + minor``, can serve a request; wherever this runs."""
        dims = (request.head_dim, request.head_dim_v)
        if dims not in LARGE_DIMS and not (dims[0] in SMALL_DIMS and dims[1] in SMALL_DIMS):
            return refuse(f"head dims are {dims}, must be multiples of 8 up to 128, or one of {LARGE_DIMS}")
        if request.softcap:
            return refuse("cudnn.flex_attention has no softcap; use the backend 'blackwell'")
        if arch == HOPPER and request.direction == "backward":
            return _backward_on_hopper(request)
        return Support(True)

    def compile_case(self, case: PrecompileCase) -> bool:
        """See :class:`WheelBackend`."""
        return precompile.compile_case(case)

    def launch_forward(
        self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, into: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See :class:`WheelBackend`."""
        return launch.launch_forward(library.load(q.device), q, k, v, call, into)

    def backward_keys_first(
        self,
        keys_done: KeysDone,
        target: Tensor | None,
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
                "cudnn.flex_attention cannot differentiate lse for 256 dims on Blackwell, which qo_comm "
                "always asks for; choose another backward pass by RuntimeConfig(kernel_backend_backward='flex') or "
                "MAGI_ATTENTION_KERNEL_BACKEND_BACKWARD=flex"
            )
        return super().backward_keys_first(keys_done, target, dout, q, k, v, out, lse, dlse, call)

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
        # It makes its own dq.
        return launch.launch_backward(library.load(q.device), dout, q, k, v, out, lse, dlse, call, keys_done)


def _backward_on_hopper(request: AttentionRequest) -> Support:
    """What of the head dims that its other passes take the backward pass on Hopper can compute."""
    dims = (request.head_dim, request.head_dim_v)
    other = "blackwell" if dims == LATENT_DIMS else "flex"
    if dims[0] != dims[1] and request.num_heads_q != request.num_heads_kv:
        return refuse(f"its backward pass on Hopper has no grouped heads for unequal head dims {dims}; use '{other}'")
    if dims[0] in TALL_TILE_DIMS and dims[1] > MOST_TALL_TILE_DIM_V:
        return refuse(f"its backward pass on Hopper lacks shared memory for head dims {dims}; use '{other}'")
    return Support(True)


BACKEND = CudnnFlexBackend()
