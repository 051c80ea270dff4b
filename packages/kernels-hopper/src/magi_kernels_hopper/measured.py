# SPDX-License-Identifier: Apache-2.0
"""How fast the kernels are expected to be, from measurements.

Measured on an H100 80GB with 64 query heads and 8 key/value heads of 128 dims, bfloat16, by benchmarks/kernels.py, in
turns with ``cudnn_flex`` and ``blackwell``. Forward figures are the lower ones of 8k and 32k tokens. Backward figures
are what ``blackwell`` expects of itself times the share of it that was reached on an H200 at 8k, 16k and 32k tokens:
the least on full and causal masks, but for short causal ones, and the mean on others. Irregular masks (``general``) are
given likewise relative to ``cudnn_flex``, by the shared question. Scattered blocks (``block_sparse``) were measured
with both others on an H200 at 32k tokens, as blocks of 64 x 64 that make up 5 % of all pairs. NOTES.md has what was
seen.
"""

import torch

from magi_attention.kernels.protocol import AttentionRequest

# (forward, backward) TFLOP/s by mask class, as magi_attention.kernels.mask_class names them.
_128_DIMS: dict[str, tuple[float, float]] = {
    "full": (662, 560),
    "causal": (698, 529),
    "varlen_full": (643, 472),
    "varlen_causal": (593, 355),
    "sliding_window": (517, 386),
    "block_causal": (670, 492),
    "block_sparse": (675, 136),
    "general": (577, 378),
}
# Backward, up to so many pairs, in bfloat16 without softcap: 1.01 to 1.02 of what FlashAttention-4 reached on an H200
# with 8k tokens, and with the shares of two ranks with 8k each. From twice as many on it was 0.98 to 1.00. In float16
# and with softcap a step takes 2 % longer (NOTES.md).
_SHORT_PAIRS, _SHORT_CAUSAL = 100_000_000, 545.0
# Other head dims share little of what made 128 dims faster backward, and have not been measured since: before scaling,
# they are given what 128 dims had then.
_OTHER_DIMS_BACKWARD: dict[str, float] = {
    "full": 545,
    "causal": 508,
    "varlen_full": 429,
    "varlen_causal": 291,
    "sliding_window": 318,
    "block_causal": 444,
    "block_sparse": 136,
    "general": 265,
}
# By the kernels for masks of small blocks, of which there are none for other head dims and with softcap.
_BLOCKS_BACKWARD = {64: 336.0, 96: 352.0, 128: 425.0}
# Kernels for other head dims keep the matrix units about this busy, compared to 128 dims.
_DIM_FACTOR = {64: 0.75, 96: 0.8, 192: 0.95, 256: 0.9}
# Tiles of 128 tokens of one head meet more of what a mask cuts off than tiles of 16 tokens of 8 heads. This was not
# measured backward, and is taken to be the same.
_UNGROUPED_DENSE, _UNGROUPED = 0.97, 0.85
# It was measured backward on scattered blocks, with 32 heads of 128 dims at 16k tokens.
_UNGROUPED_BLOCKS = 0.95


def tflops(request: AttentionRequest) -> float:
    """The expected speed in TFLOP/s, over the pairs that the mask keeps."""
    mask = request.mask_class if request.mask_class in _128_DIMS else "general"
    backward, grouped = request.direction == "backward", request.num_heads_q != request.num_heads_kv
    if backward and mask == "block_sparse" and request.head_dim in _BLOCKS_BACKWARD and not request.softcap:
        return _BLOCKS_BACKWARD[request.head_dim] * (1.0 if grouped else _UNGROUPED_BLOCKS)
    speed = _128_DIMS[mask][backward] if request.head_dim == 128 or not backward else _OTHER_DIMS_BACKWARD[mask]
    if backward and mask == "causal" and _is_short(request):
        speed = _SHORT_CAUSAL
    speed *= _DIM_FACTOR.get(request.head_dim, 1.0)
    if not grouped:
        speed *= _UNGROUPED_DENSE if mask in ("full", "causal") else _UNGROUPED
    return speed


def _is_short(request: AttentionRequest) -> bool:
    is_fastest_kernel = request.head_dim == 128 and request.dtype == torch.bfloat16 and not request.softcap
    return is_fastest_kernel and request.num_pairs is not None and request.num_pairs <= _SHORT_PAIRS
