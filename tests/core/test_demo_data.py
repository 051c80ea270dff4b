# SPDX-License-Identifier: Apache-2.0
"""The demo's texts: packing, mask families and labels, against pair-by-pair definitions."""

from itertools import pairwise

import numpy as np
import pytest

from magi_attention.cli.demo.data import IGNORED, pack, read_documents
from magi_attention.cli.demo.masks import ANSWERS, BLOCK, WINDOW, build_mask, sees_ahead, tokens_ahead
from magi_attention.cli.demo.options import MaskFamily

ENDS = np.array([0, 300, 301, 700, 704, 840, 1200])


def dense(mask, total):
    """Which pairs a mask keeps, how often."""
    i, j = np.mgrid[:total, :total]
    kept = np.zeros((total, total), int)
    for q0, q1, k0, k1, lower, upper in mask.bands():
        kept += (q0 <= i) & (i < q1) & (k0 <= j) & (j < k1) & (lower <= j - i) & (j - i <= upper)
    return kept


def definition(family, ends):
    """The family's meaning, pair by pair."""
    total = ends[-1]
    document = np.repeat(np.arange(len(ends) - 1), np.diff(ends))
    place = np.arange(total) - ends[document]
    length = np.diff(ends)[document]
    i, j = np.mgrid[:total, :total]
    same, past = document[i] == document[j], j <= i
    question = document - document % (1 + ANSWERS)
    return {
        MaskFamily.VARLEN_CAUSAL: same & past,
        MaskFamily.CAUSAL: past,
        MaskFamily.SLIDING_WINDOW: same & past & (i - j < WINDOW),
        MaskFamily.BLOCK_CAUSAL: same & (place[j] // BLOCK <= place[i] // BLOCK),
        MaskFamily.PREFIX_LM: same & (past | (place[j] < length[j] // 4)),
        MaskFamily.SHARED_QUESTION: (same & past) | (document[j] == question[i]) & ~same,
    }[family]


@pytest.mark.parametrize("family", MaskFamily)
def test_family_keeps_each_pair_of_its_definition_once(family):
    assert np.array_equal(dense(build_mask(family, ENDS), ENDS[-1]), definition(family, ENDS).astype(int))


@pytest.mark.parametrize("family", MaskFamily)
@pytest.mark.parametrize("ahead", [1, 128])
def test_sees_ahead(family, ahead):
    kept = definition(family, ENDS)
    total = int(ENDS[-1])
    expected = [i + ahead < total and kept[i, i + ahead] for i in range(total)]
    assert sees_ahead(build_mask(family, ENDS), total, ahead).tolist() == expected


@pytest.mark.parametrize("family", MaskFamily)
def test_labels_are_later_tokens_of_the_document_that_the_row_does_not_see(family):
    batch = pack(read_documents([]), 2048, family, seed=3, step=1)
    document = np.repeat(np.arange(len(batch.ends) - 1), np.diff(batch.ends))
    kept = dense(batch.mask, 2048)
    ahead = tokens_ahead(family)
    for row, label in enumerate(batch.labels.tolist()):
        target = row + ahead
        predicts = target < 2048 and document[target] == document[row] and not kept[row, target]
        assert label == (batch.tokens[target] if predicts else IGNORED)
    assert batch.num_predictions == sum(label != IGNORED for label in batch.labels.tolist()) > 0


def test_packing_is_reproducible_full_and_new_at_every_step():
    documents = read_documents([])
    first, again, later = (pack(documents, 1000, MaskFamily.VARLEN_CAUSAL, 7, step) for step in (0, 0, 1))
    assert np.array_equal(first.tokens, again.tokens)
    assert first.mask == again.mask
    assert first.mask != later.mask
    assert first.ends[0] == 0
    assert first.ends[-1] == len(first.tokens) == 1000
    assert np.diff(first.ends).max() <= 1000 // 4


def test_every_packed_piece_is_a_part_of_a_document():
    documents = read_documents([])
    batch = pack(documents, 1000, MaskFamily.CAUSAL, 0, 0)
    text = bytes(batch.tokens.astype(np.uint8))
    for start, stop in pairwise(batch.ends):
        assert any(text[start:stop] in document for document in documents)


def test_files_are_documents_and_empty_ones_are_left_out(tmp_path):
    paths = [tmp_path / name for name in "abc"]
    for path, text in zip(paths, (b"first", b"", b"third"), strict=True):
        path.write_bytes(text)
    assert read_documents(paths) == [b"first", b"third"]
    with pytest.raises(ValueError, match="no text"):
        read_documents(paths[1:2])


def test_nothing_to_predict_is_an_error():
    with pytest.raises(ValueError, match="more --tokens"):
        pack([b"short"], 64, MaskFamily.BLOCK_CAUSAL, 0, 0)
