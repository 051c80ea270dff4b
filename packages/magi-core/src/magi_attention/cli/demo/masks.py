# SPDX-License-Identifier: Apache-2.0
"""The mask families of the demo, as bands over the documents of a packed sequence."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from magi_attention.cli.demo.options import MaskFamily
from magi_attention.common.bands import UNBOUNDED, Bands
from magi_attention.common.slices import SliceTable

WINDOW = 256
"""Keys that a row of a sliding window sees, itself included."""

BLOCK = 128
"""Rows of a block in the block-causal family."""

ANSWERS = 3
"""Answers that share one question."""

Ends = NDArray[np.int64]


def build_mask(family: MaskFamily, ends: Ends) -> SliceTable:
    """Build the mask of a packed sequence.

    Args:
        family: how documents may look at each other.
        ends: ``(n + 1,)`` int64, where document i starts and, at i + 1, ends; from 0 to the sequence's length.
    """
    return SliceTable.from_bands(_BUILDERS[family](ends))


def tokens_ahead(family: MaskFamily) -> int:
    """How far ahead a row predicts: the next token or, where a row sees its whole block, the same place of the next."""
    return BLOCK if family is MaskFamily.BLOCK_CAUSAL else 1


def sees_ahead(mask: SliceTable, total: int, ahead: int) -> NDArray[np.bool_]:
    """Which rows see the key ``ahead`` places after themselves, and so cannot be asked to predict it.

    Returns ``(total,)`` bool.
    """
    q0, q1, k0, k1, lower, upper = mask.bands().T
    start, stop = np.maximum(q0, k0 - ahead), np.minimum(q1, k1 - ahead)
    kept = (lower <= ahead) & (ahead <= upper) & (start < stop)
    covered = np.zeros(total + 1, np.int64)
    np.add.at(covered, start[kept], 1)
    np.add.at(covered, stop[kept], -1)
    return covered.cumsum()[:total] > 0


def _bands(*columns: Ends | np.int64 | int) -> Bands:
    return np.column_stack(np.broadcast_arrays(*columns)).astype(np.int64)


def _causal(ends: Ends) -> Bands:
    return _bands(ends[:1], ends[-1], ends[0], ends[-1], -UNBOUNDED, 0)


def _varlen_causal(ends: Ends) -> Bands:
    return _bands(ends[:-1], ends[1:], ends[:-1], ends[1:], -UNBOUNDED, 0)


def _sliding_window(ends: Ends) -> Bands:
    return _bands(ends[:-1], ends[1:], ends[:-1], ends[1:], 1 - WINDOW, 0)


def _block_causal(ends: Ends) -> Bands:
    blocks = []
    for start, stop in pairwise(ends):
        first = np.arange(start, stop, BLOCK)
        last = np.minimum(first + BLOCK, stop)
        blocks.append(_bands(first, last, start, last, -UNBOUNDED, UNBOUNDED))
    return np.concatenate(blocks)


def _prefix_lm(ends: Ends) -> Bands:
    start, stop = ends[:-1], ends[1:]
    prefix = start + (stop - start) // 4
    seen_by_all = _bands(start, stop, start, prefix, -UNBOUNDED, UNBOUNDED)
    causal_rest = _bands(prefix, stop, prefix, stop, -UNBOUNDED, 0)
    return np.concatenate([seen_by_all, causal_rest])


def _shared_question(ends: Ends) -> Bands:
    document = np.arange(len(ends) - 1)
    question = document - document % (1 + ANSWERS)
    answer = document[document != question]
    asked = question[answer]
    of_question = _bands(ends[answer], ends[answer + 1], ends[asked], ends[asked + 1], -UNBOUNDED, UNBOUNDED)
    return np.concatenate([_varlen_causal(ends), of_question])


_BUILDERS: dict[MaskFamily, Callable[[Ends], Bands]] = {
    MaskFamily.VARLEN_CAUSAL: _varlen_causal,
    MaskFamily.CAUSAL: _causal,
    MaskFamily.SLIDING_WINDOW: _sliding_window,
    MaskFamily.BLOCK_CAUSAL: _block_causal,
    MaskFamily.PREFIX_LM: _prefix_lm,
    MaskFamily.SHARED_QUESTION: _shared_question,
}
