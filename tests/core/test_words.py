# SPDX-License-Identifier: Apache-2.0
"""Which rows of tensors kernels may move as 8-byte words."""

import torch

from magi_attention.comm.words import words_of


def test_only_rows_on_whole_words_are_taken_for_words():
    numbers = torch.arange(65, dtype=torch.float32)
    aligned, misaligned = numbers[:64].view(8, 8), numbers[1:].view(8, 8)
    assert words_of(aligned) == (aligned, 0, 4, 4)
    assert words_of(aligned[1:, 2:6]) is not None
    assert words_of(misaligned) is None
    assert words_of(aligned[:, 1:5]) is None
    assert words_of(aligned[:, :3]) is None
    assert words_of(aligned.view(8, 2, 4)[:, :, :2]) is None, "two runs of one word each"
    assert words_of(numbers[:63].view(9, 7)[:, :6]) is None, "rows begin on half words"
