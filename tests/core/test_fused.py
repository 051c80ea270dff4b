# SPDX-License-Identifier: Apache-2.0
"""Merging in place and adding up over peers: the GPU kernels do what plain PyTorch does, step by step."""

import os
import subprocess
import sys
from itertools import product

import pytest
import torch

from magi_attention.comm.packing import RowFormat, RowLayout, copy_rows, deliver, lay_out, pack, row_formats
from magi_attention.comm.reduction import add_partials
from magi_attention.comm.routes import Routes, routes_of
from magi_attention.comm.segments import add_segments, can_add_segments
from magi_attention.kernels.merge import merge_into, merge_partials
from tests.distributed.exchanges import RandomNeeds

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
EMPTY = -torch.inf
FORMATS = (
    RowFormat(torch.bfloat16, torch.Size((3, 5))),
    RowFormat(torch.float32, torch.Size((7,))),
    RowFormat(torch.bfloat16, torch.Size((2, 4))),
)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(37, 3, 24), (130, 2, 128), (5, 1, 192), (0, 2, 16)], ids=str)
def test_merging_in_place(device, dtype, shape):
    generator = torch.Generator().manual_seed(0)
    out, out2 = (torch.randn(shape, generator=generator).to(dtype).to(device) for _ in range(2))
    lse = torch.randn(shape[1], shape[0], generator=generator).to(device).T  # as some kernels return it
    lse2 = torch.randn(shape[:2], generator=generator).to(device)
    if shape[0]:
        lse[1], lse2[2], lse[3], lse2[3] = EMPTY, EMPTY, EMPTY, EMPTY
        out[1], out2[2], out[3], out2[3] = 0, 0, 0, 0
    drawn = out, lse, out2, lse2
    turned = [x.flip(0) for x in drawn]
    assert [x.stride() for x in turned] == [x.stride() for x in drawn]
    check_merging(*[x.clone() for x in drawn])
    check_merging(*turned)  # by the launch before, with other tensors
    check_merging(apart(out), lse.clone(), out2, lse2)
    check_merging(out.clone(), lse.clone(memory_format=torch.contiguous_format), apart(out2), apart(lse2))
    check_merging(out.clone(), lse.clone(), out2.float(), lse2)


def apart(x):
    """The same rows, farther apart."""
    return torch.stack([x, torch.zeros_like(x)], 1)[:, 0]


def check_merging(out, lse, out2, lse2):
    expected, expected_lse = merge_partials(out, lse, out2, lse2)
    untouched = out2.clone(), lse2.clone()
    merge_into(out, lse, out2, lse2)
    tolerance = 2 * torch.finfo(out.dtype).eps
    torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-6, atol=1e-6)
    assert torch.equal(out2, untouched[0])
    assert torch.equal(lse2, untouched[1])


def returned(
    seed: int, rank: int, device: str, formats: tuple[RowFormat, ...] = FORMATS
) -> tuple[int, Routes, RowLayout, torch.Tensor]:
    """What came back to a rank of four: three tensors' partial results."""
    table = RandomNeeds(seed, 4, 0.8).table(rank)
    routes = routes_of(table, torch.device(device))
    layout = lay_out(formats)
    buffer = torch.zeros(routes.num_sent, layout.num_words, dtype=torch.int64, device=device)
    generator = torch.Generator().manual_seed(seed)
    for number in range(len(formats)):
        column = layout.column(buffer, number)
        column.copy_(torch.randn(column.shape, generator=generator))
    return table.num_source, routes, layout, buffer


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_kernel_has_the_bits_of_one_addition_per_peer(dtype):
    num_terms = 0
    # The second time, launches with other tensors are found again; then they lie otherwise in the buffer.
    for formats in (FORMATS, FORMATS, FORMATS[:2], FORMATS[::-1]):
        for seed, rank in product(range(6), range(4)):
            num_rows, routes, layout, buffer = returned(seed, rank, "cuda", formats)
            _, host_routes, _, host_buffer = returned(seed, rank, "cpu", formats)
            into = [torch.randn(num_rows, *row.shape).to(dtype) for row in formats]
            fused = [x.cuda() for x in into]
            assert can_add_segments(fused, layout)
            add_segments(fused, buffer, layout, routes)
            add_partials(into, host_buffer, layout, host_routes, average=False)
            for number, (actual, expected) in enumerate(zip(fused, into, strict=True)):
                assert torch.equal(actual.cpu(), expected), (seed, rank, number)
            num_terms += routes.num_sent
    assert num_terms


def test_segments_list_all_that_was_sent():
    for rank in range(4):
        table = RandomNeeds(1, 4, 0.8).table(rank)
        routes = routes_of(table, torch.device("cpu"))
        rows, bounds, places = (tensor.tolist() for tensor in routes.segments)
        sent = [row for _, start, stop in table.send.tolist() for row in range(start, stop)]
        assert rows == sorted(set(sent))
        assert sorted(places) == list(range(len(sent)))
        for row, start, stop in zip(rows, bounds[:-1], bounds[1:], strict=True):
            assert [sent[place] for place in places[start:stop]] == [row] * sent.count(row)
            assert places[start:stop] == sorted(places[start:stop])


def test_columns_share_rows_and_are_aligned():
    layout = lay_out(FORMATS)
    buffer = torch.zeros(9, layout.num_words, dtype=torch.int64)
    columns = [layout.column(buffer, number) for number in range(len(FORMATS))]
    for number, (column, row) in enumerate(zip(columns, FORMATS, strict=True)):
        assert (column.dtype, column.shape) == (row.dtype, (9, *row.shape))
        assert column.data_ptr() % 16 == 0
        assert column.stride(0) * column.itemsize % 16 == 0
        assert column[0].is_contiguous()
        column.fill_(number + 1)
    assert all((column == number + 1).all() for number, column in enumerate(columns))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [slice(2, 6), torch.tensor([5, 0, 3])], ids=["run", "index"])
@pytest.mark.parametrize("shape", [(4, 6), (3, 5), (), (2, 0), (300, 8)], ids=str)
def test_packing_takes_strided_rows(device, rows, shape):
    generator = torch.Generator().manual_seed(0)
    kept = []  # so that later tensors have other addresses
    # The second time, launches with other tensors are found again; then rows lie farther apart, or hold fewer bytes.
    for width, dtype in ((2, torch.float32), (2, torch.float32), (4, torch.float32), (2, torch.bfloat16)):
        kept.append(torch.randn(7, width, *shape, generator=generator).to(dtype).to(device))
        check_packing(device, rows, kept[-1])


def check_packing(device, rows, whole):
    shape = whole.shape[2:]
    tensors = [whole[:, 1], torch.arange(7, device=device)]  # rows of the first lie apart
    layout = lay_out(row_formats(tensors))
    if not isinstance(rows, slice):
        rows = rows.to(device)
    buffer = pack(tensors, rows, len(tensors[1][rows]), layout)
    targets = [
        torch.zeros(7, *shape, dtype=whole.dtype, device=device),
        torch.zeros(7, dtype=torch.int64, device=device),
    ]
    deliver(buffer, rows, layout, targets)
    for number, (source, target) in enumerate(zip(tensors, targets, strict=True)):
        assert torch.equal(layout.column(buffer, number), source[rows])
        assert torch.equal(target[rows], source[rows])
        assert target.count_nonzero() <= source[rows].numel()
    others = [torch.zeros_like(x) for x in targets]
    copy_rows(others, tensors, rows, len(tensors[1][rows]))
    assert all(torch.equal(x, y) for x, y in zip(others, targets, strict=True))


INTERPRETED = """
import torch
from magi_attention.comm.packing import lay_out, row_formats
from magi_attention.comm.triton_rows import launch_move_rows
from magi_attention.comm.words import words_of

generator = torch.Generator().manual_seed(0)
wide = torch.randn(23, 3, 520, generator=generator)
tensors = [torch.randn(23, 2, 8, generator=generator).bfloat16(), wide[:, 1]]
for some in (tensors, tensors[:1]):
    layout = lay_out(row_formats(some))
    for rows in (torch.tensor([3, 5, 19, 0, 1, 2, 22]), slice(5, 12)):
        buffer = torch.zeros(7, layout.num_words, dtype=torch.int64)
        launch_move_rows(layout.word_rows(buffer).of_each(), [words_of(x) for x in some], rows, 7, "sources")
        targets, others = ([torch.zeros_like(x) for x in some] for _ in range(2))
        launch_move_rows([words_of(x) for x in targets], layout.word_rows(buffer).of_each(), rows, 7, "targets")
        launch_move_rows([words_of(x) for x in others], [words_of(x) for x in some], rows, 7, "both")
        for number, (x, target, other) in enumerate(zip(some, targets, others)):
            assert torch.equal(layout.column(buffer, number), x[rows]), number
            assert torch.equal(target[rows], x[rows]), number
            assert target.count_nonzero() <= x[rows].numel()
            assert torch.equal(other, target), number
"""


def test_the_kernel_that_moves_rows_in_triton_s_interpreter():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
