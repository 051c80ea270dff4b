# SPDX-License-Identifier: Apache-2.0
"""Which backward kernel computes a mask, where two can: the one that should take less time for what it has to compute.

Tiles of many queries and keys take less time for each pair; small tiles meet fewer pairs that the mask hides.
"""

from typing import NamedTuple

import numpy as np

from magi_attention.common.bands import Bands
from magi_kernels_hopper.backward_order import Work, WorkSizes, order_work
from magi_kernels_hopper.plan import FULL


class Costs(NamedTuple):
    """Clock cycles of a multiprocessor, as measured with 128 dims; NOTES.md has the measurements.

    Attributes:
        step: a tile of queries and a tile of keys.
        mask: what a step takes longer where some of its pairs are hidden.
        item: to begin and to end a tile of keys.
    """

    step: int
    mask: int
    item: int


COARSE, FINE = Costs(4500, 350, 10000), Costs(2300, 350, 8000)


def choose_work(
    bands: Bands, area: int, num_q: int, num_k: int, candidates: tuple[WorkSizes, ...], *, ordered: bool
) -> tuple[int, Work]:
    """Order the work of a mask for the kernel that should be faster.

    Args:
        bands: which (query, key) pairs count, as ``SliceTable.bands()`` gives them; no pair twice.
        area: how many these are.
        num_q: rows of the query tensor.
        num_k: rows of the key tensor.
        candidates: the sizes of a kernel or of two, the one with small tiles last.
        ordered: as for :func:`order_work`.

    Returns:
        the number of the candidate, and its work.
    """
    coarse = order_work(bands, num_q, num_k, candidates[0], ordered=ordered)
    if len(candidates) == 1:
        return 0, coarse
    sizes = candidates[1]
    cycles = expected_cycles(coarse, candidates[0], COARSE)
    least_steps = area / (sizes.tile_m * sizes.tile_k) * sizes.group * sizes.num_kv_heads
    if least_steps * FINE.step / sizes.blocks >= cycles:  # were there no pair in its tiles that the mask hides
        return 0, coarse
    fine = order_work(bands, num_q, num_k, sizes, ordered=ordered)
    return (1, fine) if expected_cycles(fine, sizes, FINE) < cycles else (0, coarse)


def expected_cycles(work: Work, sizes: WorkSizes, costs: Costs) -> float:
    """How long the blocks should be at work, all of them, or the one with the longest item."""
    tables = work.tables
    masked = tables.runs[:, 3] != FULL
    of_run = (tables.runs[:, 1] - tables.runs[:, 0]) * (costs.step + costs.mask * masked)
    # Runs are in the order of their tiles of keys.
    sums = np.concatenate([[0], np.cumsum(of_run)])
    of_tile = sums[tables.tiles[:, :2].sum(1)] - sums[tables.tiles[:, 0]]
    of_item = of_tile[work.items[:, 0]] * work.items[:, 3] + costs.item
    return max(of_item.sum() / sizes.blocks, of_item.max(initial=0))
