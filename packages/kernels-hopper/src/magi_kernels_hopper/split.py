# SPDX-License-Identifier: Apache-2.0
"""Into how many parts tiles of queries are cut along their keys, where there are too few for all multiprocessors.

Each part is computed as a tile of its own, and its result written in float32; a second kernel puts the parts of a tile
together, always in the same order (as in Flash-Decoding, Dao et al., 2023).
"""

import heapq

import numpy as np
from numpy.typing import NDArray

from magi_kernels_hopper.plan import Indices

BEGIN_BOXES = 4
"""What it costs to begin and end a part, in boxes: 3,000 to 4,000 cycles of 960."""

COMBINE_BOXES, COMBINE_BOXES_OF_PART = 8, 0.2
"""What it costs to put parts together, if there are several, and for each of them, in boxes: 5 microseconds, and the
time to write and read 100 KB of float32 at 2 TB/s."""

LEAST_BOXES = 8
"""Of a part: fewer are not worth its beginning."""

MOST_PARTS = 2048
"""Of all tiles and heads together, if all had as many as the longest: their results take 200 MB with 128 dims."""

UNEVEN = 1.1
"""How much longer than even work tiles may take before cutting them is thought about, and how much it has to gain."""


def most_boxes(boxes: Indices, copies: int, blocks: int) -> int | None:
    """Choose of how many boxes parts are, or that tiles are not to be cut.

    Args:
        boxes: of keys, of each tile of queries.
        copies: how often each tile is there: once for each pack of heads.
        blocks: that work at a time.
    """
    share = float(boxes.sum()) * copies / blocks
    if len(boxes) * copies > MOST_PARTS or boxes.max(initial=0) <= LEAST_BOXES:
        return None
    best, chosen = _finished(boxes.astype(float), copies, blocks), None
    if best <= UNEVEN * share:
        return None
    best /= UNEVEN
    least = max(LEAST_BOXES, -(-int(boxes.max()) // (MOST_PARTS // (len(boxes) * copies))))
    sizes = {max(int(np.ceil(share / cuts)), least) for cuts in (1, 1.5, 2, 3, 4, 6, 8)}
    for size in sorted(sizes, reverse=True):
        parts = -(-boxes // size)
        lengths = np.repeat(boxes / np.maximum(parts, 1), np.maximum(parts, 1))
        end = (
            _finished(lengths, copies, blocks) + COMBINE_BOXES + COMBINE_BOXES_OF_PART * len(lengths) * copies / blocks
        )
        if end < best:
            best, chosen = end, size
    return chosen


def _finished(lengths: NDArray[np.float64], copies: int, blocks: int) -> float:
    """When the last block is done, each taking the longest tile that is left."""
    ends = [0.0] * blocks
    for length in np.repeat(np.sort(lengths)[::-1], copies).tolist():
        heapq.heapreplace(ends, ends[0] + length + BEGIN_BOXES)
    return max(ends)
