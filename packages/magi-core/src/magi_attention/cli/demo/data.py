# SPDX-License-Identifier: Apache-2.0
"""Text as packed documents: bytes for tokens, a new packing at every step."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from magi_attention.cli.demo.masks import build_mask, sees_ahead, tokens_ahead
from magi_attention.cli.demo.options import MaskFamily
from magi_attention.common.slices import SliceTable

IGNORED = -100
"""The label of rows that predict nothing."""


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One training sequence.

    Attributes:
        tokens: ``(total,)`` int64, bytes.
        labels: ``(total,)`` int64, the token that each row predicts, or ``IGNORED``.
        ends: ``(n + 1,)`` int64, where document i starts and, at i + 1, ends.
        mask: which rows see which.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    ends: NDArray[np.int64]
    mask: SliceTable

    @property
    def num_predictions(self) -> int:
        """How many rows have a label."""
        return int((self.labels != IGNORED).sum())


def read_documents(files: Sequence[Path]) -> list[bytes]:
    """Read each file as one document or, if none are given, the topics of Python's own help."""
    if files:
        documents = [path.read_bytes() for path in files]
    else:
        from pydoc_data.topics import topics

        documents = [text.encode() for _, text in sorted(topics.items())]
    if not any(documents):
        raise ValueError(f"no text to train on: {', '.join(map(str, files))} hold not a single byte")
    return [document for document in documents if document]


def pack(documents: Sequence[bytes], tokens: int, family: MaskFamily, seed: int, step: int) -> PackedBatch:
    """Pack one sequence of ``tokens`` bytes, the same wherever it is called with the same arguments.

    Documents come in random order, again and again until the sequence is full. Long ones are cut to a random window of
    a 32nd to a quarter of the sequence, so that every sequence holds several documents of different lengths.

    Raises:
        ValueError: if not one row has anything to predict.
    """
    generator = np.random.default_rng([seed, step])
    pieces: list[bytes] = []
    missing = tokens
    while missing:
        for index in generator.permutation(len(documents)):
            document = documents[index]
            length = min(len(document), int(generator.integers(tokens // 32, tokens // 4, endpoint=True)) or 1, missing)
            first = int(generator.integers(len(document) - length, endpoint=True))
            piece = document[first : first + length]
            pieces.append(piece)
            missing -= len(piece)
            if not missing:
                break
    ends = np.cumsum([0, *map(len, pieces)])
    text = np.frombuffer(b"".join(pieces), np.uint8).astype(np.int64)
    mask = build_mask(family, ends)
    labels = _label(text, ends, mask, tokens_ahead(family))
    if (labels == IGNORED).all():
        raise ValueError(
            f"nothing to predict in {tokens} tokens of {len(pieces)} documents with mask family {family.value}: "
            "take longer texts or more --tokens"
        )
    return PackedBatch(text, labels, ends, mask)


def _label(tokens: NDArray[np.int64], ends: NDArray[np.int64], mask: SliceTable, ahead: int) -> NDArray[np.int64]:
    """Label each row with the token ``ahead`` places on, unless its document ends before or the row sees it already."""
    place = np.arange(len(tokens))
    document_end = np.repeat(ends[1:], np.diff(ends))
    predicts = (place + ahead < document_end) & ~sees_ahead(mask, len(tokens), ahead)
    return np.where(predicts, np.roll(tokens, -ahead), IGNORED)
