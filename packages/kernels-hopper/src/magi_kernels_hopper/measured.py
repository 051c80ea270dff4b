# SPDX-License-Identifier: Apache-2.0
"""How fast the kernels are expected to be, from measurements."""

from magi_attention.kernels.protocol import AttentionRequest

UNMEASURED = 1.0
"""Below every other GPU backend: the automatic choice takes these kernels only where nothing else can serve."""


def tflops(request: AttentionRequest) -> float:
    """The expected speed in TFLOP/s, over the pairs that the mask keeps."""
    return UNMEASURED
