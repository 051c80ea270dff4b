# SPDX-License-Identifier: Apache-2.0
"""The mask families of the demo, over the documents of a packed sequence."""

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from magi_attention.cli.demo.options import MaskFamily
from magi_attention.common import packed
from magi_attention.common.slices import SliceTable

WINDOW = 256
"""Keys that a row of a sliding window sees, itself included."""

BLOCK = 128
"""Rows of a block in the block-causal family."""

ANSWERS = 3
"""Answers that share one question."""

PREFIX_SHARE = 0.25
"""The share of a document that all of it sees in the prefix-LM family."""


def build_mask(family: MaskFamily, ends: NDArray[np.int64]) -> SliceTable:
    """Build the mask of a packed sequence.

    Args:
        family: how documents may look at each other.
        ends: ``(n + 1,)`` int64, where document i starts and, at i + 1, ends; from 0 to the sequence's length.
    """
    return _BUILDERS[family](ends)


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


def _causal(ends: packed.Ends) -> SliceTable:
    return packed.varlen([ends[0], ends[-1]])


_BUILDERS: dict[MaskFamily, Callable[[packed.Ends], SliceTable]] = {
    MaskFamily.VARLEN_CAUSAL: packed.varlen,
    MaskFamily.CAUSAL: _causal,
    MaskFamily.SLIDING_WINDOW: partial(packed.sliding_window, left=WINDOW - 1, right=0),
    MaskFamily.BLOCK_CAUSAL: partial(packed.block_causal, block=BLOCK),
    MaskFamily.PREFIX_LM: partial(packed.prefix_lm, share=PREFIX_SHARE),
    MaskFamily.SHARED_QUESTION: partial(packed.shared_question, answers=ANSWERS),
}
