# SPDX-License-Identifier: Apache-2.0
"""Masks of packed documents and the named ones, against definitions token by token."""

import numpy as np
import pytest

from magi_attention.common import packed, workloads
from magi_attention.common.mask import dense_mask
from magi_attention.common.slices import find_double_cover

ENDS = [0, 5, 5, 6, 14, 30, 31, 40]
TOTAL = ENDS[-1]
DOCUMENT = np.searchsorted(ENDS, np.arange(TOTAL), side="right") - 1
START, STOP = np.array(ENDS)[DOCUMENT], np.array(ENDS)[DOCUMENT + 1]
QUERY, KEY = np.mgrid[:TOTAL, :TOTAL]
SAME = DOCUMENT[:, None] == DOCUMENT[None, :]
PREFIX = START + np.maximum(1, (STOP - START) // 4)
QUESTION = DOCUMENT - DOCUMENT % 3

CASES = {
    "varlen causal": (packed.varlen(ENDS), SAME & (KEY <= QUERY)),
    "varlen full": (packed.varlen(ENDS, causal=False), SAME),
    "window": (packed.sliding_window(ENDS, 3, 1), SAME & (QUERY - 3 <= KEY) & (KEY <= QUERY + 1)),
    "window, left open": (packed.sliding_window(ENDS, -1, 2), SAME & (KEY <= QUERY + 2)),
    "window, right open": (packed.sliding_window(ENDS, 0, -1), SAME & (KEY >= QUERY)),
    "block-causal": (
        packed.block_causal(ENDS, 4),
        SAME & ((KEY - START[:, None]) // 4 <= (QUERY - START[:, None]) // 4),
    ),
    "prefix": (packed.prefix_lm(ENDS, 0.25), SAME & ((KEY <= QUERY) | (np.maximum(QUERY, KEY) < PREFIX[:, None]))),
    "question": (
        packed.shared_question(ENDS, 2),
        (SAME & (KEY <= QUERY)) | ((DOCUMENT[None] == QUESTION[:, None]) & (DOCUMENT != QUESTION)[:, None]),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_builder_keeps_what_its_definition_says(name):
    slices, kept = CASES[name]
    assert np.array_equal(dense_mask(slices.bands(), TOTAL, TOTAL), kept)
    assert find_double_cover(slices) is None


def test_documents_are_cut_into_questions_and_answers():
    ends = packed.questions_and_answers([0, 100, 108], 0.25, 3)
    assert ends.tolist() == [0, 25, 50, 75, 100, 102, 104, 106, 108]


@pytest.mark.parametrize("name", workloads.WORKLOADS)
@pytest.mark.parametrize("total", [256, 700, 1 << 20])
def test_workloads_cover_every_row_and_no_pair_twice(name, total):
    slices = workloads.make(name, total)
    assert find_double_cover(slices) is None
    seen = np.zeros(total + 1, np.int64)
    np.add.at(seen, slices.rows[:, 0], 1)
    np.add.at(seen, slices.rows[:, 1], -1)
    assert (seen.cumsum()[:total] > 0).all()
    assert slices.rows[:, [1, 3]].max() == total


@pytest.mark.parametrize("total", [256, 257, 300, 4096, 1 << 20])
def test_documents_fill_the_sequence(total):
    lengths = np.diff(workloads.document_ends(total))
    assert lengths.sum() == total
    assert lengths.min() > 0
    assert lengths.max() <= total // 4


def test_areas_of_the_benchmarks_masks_stay():
    areas = {name: workloads.make(name, 1 << 20).area() for name in workloads.WORKLOADS}
    assert areas == {
        "full": 1 << 40,
        "causal": (1 << 20) * ((1 << 20) + 1) // 2,
        "varlen_full": 37954353636,
        "varlen_causal": 18977701106,
        "swa_causal_1024": 1073218048,
        "varlen_block_causal_4k": 20962007524,
        "prefix_lm": 20163540779,
        "shared_question": 10971473268,
    }


def test_unknown_and_short_workloads_are_refused():
    with pytest.raises(ValueError, match="there is no mask 'odd'; take one of full, causal"):
        workloads.make("odd", 4096)
    with pytest.raises(ValueError, match="needs at least 256 tokens, not 255"):
        workloads.make("full", 255)
