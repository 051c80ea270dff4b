# SPDX-License-Identifier: Apache-2.0
"""Keys by which launches of Triton kernels are found again, without a GPU: the same ones for the same formats alone."""

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from magi_attention.comm import segments, words
from magi_attention.comm.packing import RowFormat, lay_out
from magi_attention.comm.segments import add_segments, can_add_segments
from magi_attention.comm.words import BufferRows, Side, move_rows, move_same_rows
from magi_attention.kernels import merge
from magi_attention.kernels.merge import merge_into

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class OnGpu:
    """A tensor that says that it is on a GPU."""

    is_cuda = True

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __getattr__(self, name: str) -> object:
        return getattr(self.tensor, name)


class Format(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def tensor(self) -> OnGpu:
        return OnGpu(torch.empty_strided(self.shape, self.strides, dtype=self.dtype))


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """The key, addresses and free integers of each launch."""
    made: list[tuple[object, list[int], tuple[int, ...]]] = []

    def relaunch(key: object, device_index: int, addresses: list[int], free: tuple[int, ...]) -> bool:
        made.append((key, [*addresses], free))
        return True

    for module in (merge, segments, words):
        monkeypatch.setattr(module, "relaunch", relaunch)
        monkeypatch.setattr(module, "has_triton", lambda: True)
    return made


def check_keys(launches, launch, base, others) -> None:
    """Launch with what is given, twice each: keys are those of the same arguments, and differ where any do."""
    for given in (base, *others):
        for _ in range(2):
            launch(**given)
    keys = [key for key, *_ in launches]
    assert keys[::2] == keys[1::2]
    assert len(set(keys)) == 1 + len(others)


def variants(base: dict[str, object], **others: list[object]) -> list[dict[str, object]]:
    """What differs from ``base`` in one thing."""
    return [base | {name: value} for name, values in others.items() for value in values]


def merging(out: Format, lse: Format, out2: Format, lse2: Format) -> None:
    merge_into(out.tensor(), lse.tensor(), out2.tensor(), lse2.tensor())


def test_keys_of_merging(launches):
    out, lse = Format(BF16, (9, 4, 8), (32, 8, 1)), Format(FP32, (9, 4), (4, 1))
    other_outs = [
        out._replace(dtype=FP16),
        out._replace(dtype=FP32),
        out._replace(strides=(64, 8, 1)),
        out._replace(strides=(32, 16, 1)),
        *[out._replace(shape=shape) for shape in ((8, 4, 8), (9, 3, 8), (9, 4, 7))],
    ]
    other_lses = [lse._replace(strides=(1, 9)), lse._replace(strides=(8, 1)), lse._replace(shape=(8, 4))]
    base = {"out": out, "lse": lse, "out2": out, "lse2": lse}
    others = variants(base, out=other_outs, out2=other_outs, lse=other_lses, lse2=other_lses)
    check_keys(launches, merging, base, others)
    assert launches[0][1] != launches[1][1]


def test_addresses_and_pairs_of_merging(launches):
    tensors = [Format(BF16, (9, 4, 8), (32, 8, 1)).tensor() for _ in range(2)]
    lses = [Format(FP32, (9, 4), (4, 1)).tensor() for _ in range(2)]
    merge_into(tensors[0], lses[0], tensors[1], lses[1])
    expected = [x.data_ptr() for pair in zip(tensors, lses, strict=True) for x in pair]
    assert [each[1:] for each in launches] == [(expected, (36,))]


def adding(targets: list[Format], formats: list[RowFormat], num_segments: int, row_words: int) -> None:
    tables = (torch.zeros(num_segments, dtype=torch.int32), *torch.zeros(2, num_segments + 1, dtype=torch.int32))
    buffer = torch.zeros(6, row_words, dtype=torch.int64)
    add_segments([x.tensor() for x in targets], buffer, lay_out(tuple(formats)), SimpleNamespace(segments=tables))


def test_rows_too_long_for_a_grid_are_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(words, "relaunch", lambda *launch: False)
    rows = [OnGpu(torch.empty(2, words.MOST_WORDS + 1, dtype=torch.int64, device="meta"))]
    for length, can in ((1 << 24, True), ((1 << 24) + 1, False)):
        sums = [OnGpu(torch.empty(2, length, device="meta")) for _ in range(2)]
        assert can_add_segments(sums, lay_out(tuple(RowFormat(FP32, x.shape[1:]) for x in sums))) == can
    assert not move_rows(rows, rows, slice(0, 2), 2, scatter=True)


def test_keys_of_adding_segments(launches):
    first, second = Format(FP32, (9, 4), (4, 1)), Format(FP32, (9, 8), (8, 1))
    narrow, wide = RowFormat(BF16, torch.Size((4,))), RowFormat(BF16, torch.Size((8,)))
    base = {"targets": [first, second], "formats": [narrow, wide], "num_segments": 5, "row_words": 16}
    targets = [
        [first._replace(dtype=BF16), second],
        [first, second._replace(dtype=FP16)],
        [first._replace(shape=(8, 4)), second],
        [first, second._replace(shape=(9, 7))],
        [first],
    ]
    formats = [
        [narrow._replace(dtype=FP16), wide],
        [narrow, wide._replace(dtype=FP16)],
        [narrow, wide._replace(shape=torch.Size((2, 4)))],
        [narrow, narrow],
    ]
    check_keys(
        launches, adding, base, variants(base, targets=targets, formats=formats, num_segments=[4], row_words=[32])
    )


def test_third_tensors_are_added_by_launches_of_their_own(launches):
    target, row = Format(FP32, (9, 4), (4, 1)), RowFormat(FP32, torch.Size((4,)))
    adding([target] * 3, [row] * 3, 5, 6)
    first, second = (key for key, *_ in launches)
    assert first != second


ROWS, INDEX = slice(2, 5), torch.tensor([4, 0, 2])


def moving(targets: object, sources: object, rows: slice | torch.Tensor, num_rows: int, side: Side) -> None:
    both = [
        given if isinstance(given, tuple) else [x.tensor() for x in given]  # a tuple is the runs of a buffer
        for given in (targets, sources)
    ]
    written, read = (
        BufferRows(OnGpu(torch.zeros(9, 12, dtype=torch.int64)), each) if isinstance(each, tuple) else each
        for each in both
    )
    if side == "both":
        assert move_same_rows(written, read, rows, num_rows)
    else:
        assert move_rows(written, read, rows, num_rows, scatter=side == "targets")


def test_keys_of_moving_rows(launches):
    first, second = Format(FP32, (9, 4), (4, 1)), Format(BF16, (9, 8), (8, 1))
    base = {"targets": [first, second], "sources": [first, second], "rows": ROWS, "num_rows": 3, "side": "sources"}
    sides = [
        [first._replace(dtype=FP16), second],
        [first, second._replace(dtype=FP16)],
        [first._replace(shape=(8, 4)), second],
        [first, second._replace(shape=(9, 4))],
        [first._replace(strides=(8, 1)), second],
        [first, second._replace(strides=(16, 1))],
        [first, first],
        [first],
        ((0, 12, 2), (2, 12, 2)),
        ((0, 12, 2), (4, 12, 2)),
        ((0, 10, 2), (2, 10, 2)),
        ((0, 12, 2), (2, 12, 1)),
        ((0, 12, 2),),
    ]
    others = variants(
        base,
        targets=sides,
        sources=sides,
        rows=[INDEX, INDEX.int()],
        num_rows=[2],
        side=["targets", "both"],
    )
    check_keys(launches, moving, base, others)


def test_runs_that_begin_elsewhere_are_moved_by_the_same_launch(launches):
    row = Format(FP32, (9, 4), (4, 1))
    for start in (2, 3):
        moving([row], [row], slice(start, start + 3), 3, "targets")
    moving([row], [row], INDEX, 3, "targets")
    (key, _, free), (again, _, free_again), (indexed, addresses, free_indexed) = launches
    assert key == again != indexed
    assert (free, free_again, free_indexed) == ((3, 2), (3, 3), (3, 0))
    assert addresses[-1] == INDEX.data_ptr()
