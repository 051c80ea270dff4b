# SPDX-License-Identifier: Apache-2.0
"""The class of a mask, however it was cut into slices."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention.common import bands as band
from magi_attention.common import workloads
from magi_attention.common.slices import SliceTable, expand_counts
from magi_attention.config import MinHeapDispatchAlg
from magi_attention.kernels.mask_class import MASK_CLASSES, mask_class
from magi_attention.plan.build import build_plans
from magi_attention.plan.dispatch import make_layout
from magi_attention.plan.stages import StageOptions
from magi_attention.testing.masks import random_masks

CLASS_OF_WORKLOAD = {
    "full": "full",
    "causal": "causal",
    "varlen_full": "varlen_full",
    "varlen_causal": "varlen_causal",
    "swa_causal_1024": "sliding_window",
    "varlen_block_causal_4k": "block_causal",
    "prefix_lm": "varlen_causal",
    "shared_question": "general",
}


def cut(slices: SliceTable, size_q: int, size_k: int) -> SliceTable:
    """The same mask in slices of at most ``size_q`` rows and ``size_k`` columns, in a random order."""
    bands = slices.bands()
    for axis, size in ((band.Q0, size_q), (band.K0, size_k)):
        owner, step = expand_counts(-(-bands[:, axis + 1] // size) - bands[:, axis] // size)
        start = (bands[owner, axis] // size + step) * size
        bands, _ = band.shrink(band.clip(bands[owner], axis, start, start + size))
    return SliceTable(np.random.default_rng(0).permutation(SliceTable.from_bands(bands).rows))


@pytest.mark.parametrize(("name", "expected"), CLASS_OF_WORKLOAD.items())
@pytest.mark.parametrize("sizes", [None, (1000, 1 << 20), (1 << 20, 5000), (4096, 1024), (777, 3333)])
def test_workloads_however_they_are_cut(name, expected, sizes):
    slices = workloads.make(name, 1 << 15)
    assert mask_class(slices if sizes is None else cut(slices, *sizes)) == expected


@pytest.mark.parametrize(("name", "expected"), CLASS_OF_WORKLOAD.items())
def test_a_ranks_own_rows_are_a_small_mask_of_the_same_class(name, expected):
    total = 1 << 16
    mask = workloads.make(name, total)
    layout = make_layout(
        mask, num_real=total, total=total, chunk_size=2048, num_ranks=4, algorithm=MinHeapDispatchAlg()
    )
    for plan in build_plans(mask, layout, range(4), StageOptions(degree=1)):
        assert mask_class(plan.stages[0].slices) == expected


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], "general"),
        ([[0, 5, 3, 3, 0]], "general"),
        ([[5, 9, 100, 300, 0]], "full"),
        ([[0, 100, 0, 100, 2]], "causal"),  # keys from a diagonal on
        ([[0, 100, 0, 300, 1]], "causal"),
        ([[0, 100, 0, 110, 3]], "sliding_window"),
        ([[0, 100, 0, 150, 3], [100, 200, 200, 350, 3]], "sliding_window"),
        ([[0, 50, 0, 50, 0], [60, 90, 0, 50, 0]], "full"),  # rows that see nothing between them
        ([[0, 50, 0, 50, 0], [50, 90, 60, 100, 0]], "varlen_full"),
        ([[0, 50, 0, 50, 1], [50, 90, 60, 100, 1]], "varlen_causal"),
        ([[0, 50, 0, 50, 0], [50, 90, 0, 80, 0], [90, 99, 0, 100, 0]], "block_causal"),
        ([[0, 50, 0, 60, 0], [50, 90, 30, 80, 0]], "block_sparse"),
        ([[0, 50, 0, 20, 0], [0, 50, 30, 50, 0]], "block_sparse"),
        ([[0, 50, 0, 20, 0], [0, 50, 30, 80, 1]], "general"),
        # A document of padding does not make a mask one of many documents.
        ([[0, 1000, 0, 1000, 1], [1000, 1010, 1000, 1010, 1]], "causal"),
    ],
)
def test_small_masks(rows, expected):
    assert mask_class(SliceTable(rows)) == expected


def test_two_bands_along_a_common_diagonal_are_one_rectangle():
    bands = [[0, 90, 0, 90, -band.UNBOUNDED, 7], [0, 90, 0, 90, 8, band.UNBOUNDED]]
    assert mask_class(SliceTable.from_bands(np.array(bands))) == "full"


def test_many_pieces_of_the_same_rows_are_not_looked_at_closely():
    steps = np.arange(3000)
    rows = np.column_stack([steps, steps + 3000, 4 * steps, 4 * steps + 2, 0 * steps])
    assert mask_class(SliceTable(rows)) == "block_sparse"
    rows[7, 4] = 1
    assert mask_class(SliceTable(rows)) == "general"


@settings(max_examples=100)
@given(random_masks(90), st.integers(2, 40), st.integers(2, 40))
def test_any_mask_has_a_class(mask, size_q, size_k):
    _, slices = mask
    assert mask_class(slices) in MASK_CLASSES
    assert (mask_class(slices) == "full") == (mask_class(cut(slices, size_q, size_k)) == "full")
