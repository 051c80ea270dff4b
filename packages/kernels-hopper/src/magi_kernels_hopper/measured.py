# SPDX-License-Identifier: Apache-2.0
"""How fast the kernels are expected to be, from measurements.

Measured on an H100 80GB with 64 query heads and 8 key/value heads of 128 dims, bfloat16, by benchmarks/kernels.py, in
turns with ``cudnn_flex`` and ``blackwell``. Forward figures are the lower ones of 8k and 32k tokens. Backward figures
are what ``blackwell`` expects of itself times the share of it that was reached on an H200 at 8k, 16k and 32k tokens:
the least on full and causal masks, the mean on others. Irregular masks (``general``) are given likewise relative to
``cudnn_flex``, by the shared question. Scattered blocks (``block_sparse``) were measured with both others on an H200 at
32k tokens, as blocks of 64 x 64 that make up 5 % of all pairs; with other head dims than 128 not since there are
kernels for them. NOTES.md has what was seen.
"""

from magi_attention.kernels.protocol import AttentionRequest

# (forward, backward) TFLOP/s by mask class, as magi_attention.kernels.mask_class names them.
_128_DIMS = {
    "full": (662, 560),
    "causal": (698, 529),
    "varlen_full": (643, 472),
    "varlen_causal": (593, 355),
    "sliding_window": (517, 386),
    "block_causal": (670, 492),
    "block_sparse": (675, 423),
    "general": (577, 378),
}
# Other head dims share little of what made 128 dims faster backward, and have not been measured since: before scaling,
# they are given what 128 dims had then.
_OTHER_DIMS_BACKWARD = {
    "full": 545,
    "causal": 508,
    "varlen_full": 429,
    "varlen_causal": 291,
    "sliding_window": 318,
    "block_causal": 444,
    "block_sparse": 136,
    "general": 265,
}
# With softcap there are no kernels for masks of small blocks.
_BLOCKS_SOFTCAP_BACKWARD = 136
# Kernels for other head dims keep the matrix units about this busy, compared to 128 dims.
_DIM_FACTOR = {64: 0.75, 96: 0.8, 192: 0.95, 256: 0.9}
# Tiles of 128 tokens of one head meet more of what a mask cuts off than tiles of 16 tokens of 8 heads. This was not
# measured backward, and is taken to be the same.
_UNGROUPED_DENSE, _UNGROUPED = 0.97, 0.85


def tflops(request: AttentionRequest) -> float:
    """The expected speed in TFLOP/s, over the pairs that the mask keeps."""
    mask = request.mask_class if request.mask_class in _128_DIMS else "general"
    forward, backward = _128_DIMS[mask]
    if request.head_dim != 128:
        backward = _OTHER_DIMS_BACKWARD[mask]
    if mask == "block_sparse" and request.softcap:
        backward = _BLOCKS_SOFTCAP_BACKWARD
    factor = _DIM_FACTOR.get(request.head_dim, 1.0)
    if request.num_heads_q == request.num_heads_kv:
        factor *= _UNGROUPED_DENSE if mask in ("full", "causal") else _UNGROUPED
    return factor * (backward if request.direction == "backward" else forward)
