# SPDX-License-Identifier: Apache-2.0
"""How fast the backends are expected to be, from measurements.

Measured on an H100 80GB with 64 query heads and 8 key/value heads of 128 dims, bfloat16, 8k and 32k tokens (the lower
figure of the two); benchmarks/kernels.py measures again. Blackwell has not been measured: it is taken to rank the
backends as Hopper does, at 2.2 times the speed, the ratio of the chips' matrix throughput.
"""

from magi_attention.kernels.protocol import AttentionRequest
from magi_kernels_blackwell.wheels import HOPPER, capability_of

# (forward, backward) TFLOP/s by mask class, as magi_attention.kernels.mask_class names them.
_H100: dict[str, dict[str, tuple[float, float]]] = {
    "fa4": {
        "full": (668, 611),
        "causal": (653, 547),
        "varlen_full": (424, 415),
        "varlen_causal": (362, 332),
        "sliding_window": (427, 333),
        "block_causal": (476, 433),
        "general": (346, 331),
    },
    "cudnn_flex": {
        "full": (655, 581),
        "causal": (559, 501),
        "varlen_full": (435, 356),
        "varlen_causal": (316, 248),
        "sliding_window": (235, 286),
        "block_causal": (344, 382),
        "general": (316, 248),
    },
}
_BLACKWELL_OVER_HOPPER = 2.2
# Kernels for other head dims keep the matrix units about this busy, compared to 128 dims.
_DIM_FACTOR = {64: 0.75, 96: 0.8, 192: 0.95, 256: 0.9}


def tflops(backend: str, request: AttentionRequest) -> float:
    """The expected speed of ``"fa4"`` or ``"cudnn_flex"`` in TFLOP/s, over the pairs that the mask keeps."""
    by_mask = _H100[backend]
    forward, backward = by_mask.get(request.mask_class, by_mask["general"])
    speed = backward if request.direction == "backward" else forward
    speed *= _DIM_FACTOR.get(request.head_dim, 1.0)
    on_hopper = request.device.type != "cuda" or capability_of(request.device) == HOPPER
    return speed if on_hopper else speed * _BLACKWELL_OVER_HOPPER
