# SPDX-License-Identifier: Apache-2.0
"""Masks that `magi plan` reads from files, and what it says of files that hold none."""

import json
import re

import numpy as np
import pytest

from magi_attention.cli.plan.masks import read_mask
from magi_attention.cli.plan.options import PlanOptions
from magi_attention.common import packed
from magi_attention.common.mask import AttnMask
from magi_attention.testing.oracle import dense_mask

ENDS = [0, 300, 300, 1000, 1024]


def same_mask(first, second, total=1024):
    return AttnMask.from_slices(first, total, total) == AttnMask.from_slices(second, total, total)


def study(tmp_path, name, text, **options):
    (tmp_path / name).write_text(text)
    kind = "slices" if "slices" in name else "cu_seqlens"
    return read_mask(PlanOptions(**{kind: tmp_path / name}, **options))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ends.txt", "0 300 300\n1000, 1024\n"),
        ("ends.csv", "0,300,300,1000,1024"),
        ("ends.csv", "\ufeff0,300,300,1000,1024"),
        ("ends.json", "[0, 300, 300, 1000, 1024]"),
    ],
)
def test_documents_ends_from_text(tmp_path, name, text):
    mask = study(tmp_path, name, text)
    assert (mask.tokens, mask.name) == (1024, name)
    assert same_mask(mask.slices, packed.varlen(ENDS))


def test_documents_ends_from_npy_with_what_they_see(tmp_path):
    path = tmp_path / "ends.npy"
    np.save(path, np.array(ENDS, np.int32))
    for options, expected in (
        ({"causal": False}, packed.varlen(ENDS, causal=False)),
        ({"causal": True}, packed.varlen(ENDS)),
        ({"window": (7, 3)}, packed.sliding_window(ENDS, 7, 3)),
        ({"window": (-1, 0)}, packed.varlen(ENDS)),
    ):
        assert same_mask(read_mask(PlanOptions(cu_seqlens=path, **options)).slices, expected)


def test_slices_from_lists_and_objects(tmp_path):
    entries = [
        [0, 100, 0, 100, "causal"],
        [100, 200, 0, 100],
        {"q": [100, 200], "k": [100, 200], "type": 1},
        {"q": [200, 256], "k": [190, 256], "type": "bi-causal"},
        {"q": [200, 256], "k": [0, 10]},
    ]
    mask = study(tmp_path, "slices.json", json.dumps(entries))
    assert mask.tokens == 256
    assert mask.slices.rows.tolist() == [
        [0, 100, 0, 100, 1],
        [100, 200, 0, 100, 0],
        [100, 200, 100, 200, 1],
        [200, 256, 190, 256, 3],
        [200, 256, 0, 10, 0],
    ]
    assert study(tmp_path, "slices.json", json.dumps(entries), tokens=1000).tokens == 1000


FILES = [
    ("ends.txt", "0 12\n30 twelve\n", "ends.txt, line 2: 'twelve' is not an integer"),
    ("ends.txt", "10 20 30", "ends.txt, entry 1: the first number must be 0, not 10"),
    ("ends.txt", "0 20 10 30", "ends.txt, entry 3: 10 is less than 20 before it"),
    ("ends.txt", "0 4 99999999999999999999", "ends.txt, entry 3: 99999999999999999999 is too large"),
    ("ends.txt", "", "holds 0 numbers; it needs 0 and the end of at least one document"),
    ("ends.txt", "0 0", "keeps no pair"),
    ("ends.json", "[0, 10,]", "ends.json, line 1, column"),
    ("ends.json", '[0, 10, "x"]', 'ends.json, entry 3: "x" is not an integer'),
    ("ends.json", "[0, true]", "ends.json, entry 2: true is not an integer"),
    ("ends.json", '{"a": 1}', "must hold a JSON list of integers, such as [0, 4096, 10240], not a JSON dict"),
    ("ends.npy", "0 1 2", "is not a .npy file of numbers"),
    ("slices.json", "[[0, 4, 0, 4],\n[0, 4 0]]", "slices.json, line 2, column 7"),
    ("slices.json", "[[0, 4, 0, 4], [0, 4, 0]]", "slice 2: [0, 4, 0] is not a slice; one is [0, 4096,"),
    ("slices.json", '[[0, 4, 0, 4, "odd"]]', 'slice 1: "odd" is not a type of slice; types are full (0), causal (1)'),
    ("slices.json", "[[0, 4, 0, 4, 4]]", "slice 1: 4 is not a type of slice"),
    ("slices.json", "[[0, 4, 0, 4.5]]", "slice 1: 4.5 is not a row; rows are integers from 0 on"),
    ("slices.json", "[[-1, 4, 0, 4]]", "slice 1: -1 is not a row"),
    ("slices.json", "[[0, 4, 0, 99999999999999999999]]", "slice 1: 99999999999999999999 is too large"),
    ("slices.json", "[[0, 4, 8, 4]]", "slice 1: the keys [8, 4) end before they start"),
    ("slices.json", '[{"q": [0, 4], "kk": [0, 4]}]', "slice 1: unknown kk; a slice is"),
    ("slices.json", '[{"q": [0, 4], "k": 4}]', "slice 1: q and k must each be [start, stop]"),
    ("slices.json", "[[0, 4, 0, 4], [4, 8, 0, 4], [2, 5, 3, 9]]", "slice 1 [0, 4, 0, 4] and slice 3 [2, 5, 3, 9] keep"),
    ("slices.json", "[]", "keeps no pair"),
    ("slices.json", "4", "must hold a JSON list of slices"),
]


@pytest.mark.parametrize(("name", "text", "words"), FILES)
def test_bad_files_are_told_where_they_are_wrong(tmp_path, name, text, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        study(tmp_path, name, text)


def test_arrays_of_other_shapes_are_refused(tmp_path):
    for array in (np.zeros((2, 2), int), np.array([0.0, 4.0])):
        np.save(tmp_path / "ends.npy", array)
        with pytest.raises(ValueError, match="must hold one dimension of integers, not shape"):
            read_mask(PlanOptions(cu_seqlens=tmp_path / "ends.npy"))
    (tmp_path / "ends.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"is not a text file; binary arrays must be \.npy files"):
        read_mask(PlanOptions(cu_seqlens=tmp_path / "ends.bin"))


def test_slices_beyond_the_tokens_are_refused(tmp_path):
    with pytest.raises(ValueError, match="slice 2: its keys end at 64, beyond --tokens 60"):
        study(tmp_path, "slices.json", "[[0, 10, 0, 10], [10, 20, 50, 64]]", tokens=60)


def test_keys_end_by_their_own_length(tmp_path):
    text = "[[0, 10, 0, 10], [10, 20, 50, 64]]"
    mask = study(tmp_path, "slices.json", text, tokens_k=100)
    assert (mask.tokens, mask.tokens_k, mask.num_keys) == (20, 100, 100)
    with pytest.raises(ValueError, match="slice 2: its keys end at 64, beyond --tokens-k 60"):
        study(tmp_path, "slices.json", text, tokens_k=60)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (3, 2)}], ids=["full", "causal", "window"])
def test_documents_of_two_sequences(tmp_path, options):
    (tmp_path / "q.txt").write_text("0 300 300 1000")
    (tmp_path / "k.json").write_text("[0, 100, 150, 400]")
    mask = read_mask(PlanOptions(cu_seqlens=tmp_path / "q.txt", cu_seqlens_k=tmp_path / "k.json", **options))
    assert (mask.name, mask.tokens, mask.tokens_k) == ("q.txt to k.json", 1000, 400)
    seen = np.zeros((1000, 400), bool)
    for q0, q1, k0, k1 in ((0, 300, 0, 100), (300, 1000, 150, 400)):
        offset = np.arange(k0, k1) - np.arange(q0, q1)[:, None] - (k1 - q1)
        left, right = options.get("window", (1000, 0 if options else 1000))
        seen[q0:q1, k0:k1] = (-left <= offset) & (offset <= right)
    assert mask.slices.area() == seen.sum()
    assert (dense_mask(mask.slices, 1000, 400).numpy() == seen).all()
