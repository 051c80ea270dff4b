# SPDX-License-Identifier: Apache-2.0
"""How fast the backends are expected to be, from measurements.

Measured with 64 query heads and 8 key/value heads of 128 dims, bfloat16, at 8k and 32k tokens (the lower figure of the
two) on an H100 80GB by benchmarks/kernels.py, in turns with each other and with the backend ``hopper``. Irregular masks
(``general``) are taken to run as causal documents do, but backward by FlashAttention-4 at 0.97 of ``cudnn_flex``, as
measured on an H200. Scattered blocks (``block_sparse``) were measured on an H200 at 32k tokens, as blocks of 64 x 64
that make up 5 % of all pairs; at 1 % and 10 % the order is the same. Blackwell has not been measured: it is taken to
rank the backends as Hopper does, at 2.2 times the speed, the ratio of the chips' matrix throughput.
"""

from magi_attention.kernels.protocol import AttentionRequest
from magi_kernels_blackwell.wheels import HOPPER, capability_of

# (forward, backward) TFLOP/s by mask class, as magi_attention.kernels.mask_class names them.
_H100: dict[str, dict[str, tuple[float, float]]] = {
    "fa4": {
        "full": (624, 596),
        "causal": (644, 538),
        "varlen_full": (554, 454),
        "varlen_causal": (458, 323),
        "sliding_window": (441, 371),
        "block_causal": (561, 460),
        "block_sparse": (54, 110),
        "general": (458, 293),
    },
    "cudnn_flex": {
        "full": (615, 566),
        "causal": (643, 523),
        "varlen_full": (579, 415),
        "varlen_causal": (497, 302),
        "sliding_window": (453, 338),
        "block_causal": (598, 418),
        "block_sparse": (345, 268),
        "general": (497, 302),
    },
}
# FlashAttention-4 relative to ``cudnn_flex`` where 64 dims rank them otherwise, on an H200 at 16k tokens. Only ratios
# count of what was measured: figures of that GPU are not to be compared with those above, nor with other backends'.
_FA4_OF_64_DIMS: dict[str, tuple[float, float]] = {"sliding_window": (409 / 400, 364 / 377)}
_BLACKWELL_OVER_HOPPER = 2.2
# Kernels for other head dims keep the matrix units about this busy, compared to 128 dims.
_DIM_FACTOR = {64: 0.75, 96: 0.8, 192: 0.95, 256: 0.9}


def tflops(backend: str, request: AttentionRequest) -> float:
    """The expected speed of ``"fa4"`` or ``"cudnn_flex"`` in TFLOP/s, over the pairs that the mask keeps."""
    mask, backward = request.mask_class, request.direction == "backward"
    factor = _DIM_FACTOR.get(request.head_dim, 1.0)
    if backend == "fa4" and request.head_dim == 64 and mask in _FA4_OF_64_DIMS:
        backend, factor = "cudnn_flex", factor * _FA4_OF_64_DIMS[mask][backward]
    by_mask = _H100[backend]
    speed = factor * by_mask.get(mask, by_mask["general"])[backward]
    on_hopper = request.device.type != "cuda" or capability_of(request.device) == HOPPER
    return speed if on_hopper else speed * _BLACKWELL_OVER_HOPPER
