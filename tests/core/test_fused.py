# SPDX-License-Identifier: Apache-2.0
"""Merging in place and adding up over peers: the GPU kernels do what plain PyTorch does, step by step."""

import pytest
import torch

from magi_attention.comm.packing import Blocks, RowFormat, lay_out
from magi_attention.comm.reduction import add_partials
from magi_attention.comm.routes import Routes, routes_of
from magi_attention.comm.segments import add_segments, can_add_segments
from magi_attention.kernels.merge import merge_into, merge_partials
from tests.distributed.exchanges import RandomNeeds

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
EMPTY = -torch.inf


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
    expected, expected_lse = merge_partials(out, lse, out2, lse2)
    untouched = out2.clone(), lse2.clone()
    merge_into(out, lse, out2, lse2)
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-6, atol=1e-6)
    assert torch.equal(out2, untouched[0])
    assert torch.equal(lse2, untouched[1])


def returned(seed: int, rank: int, device: str) -> tuple[int, Routes, Blocks, torch.Tensor]:
    """What came back to a rank of four: two tensors' partial results."""
    table = RandomNeeds(seed, 4, 0.8).table(rank)
    routes = routes_of(table, torch.device(device))
    formats = (RowFormat(torch.bfloat16, torch.Size((3, 5))), RowFormat(torch.float32, torch.Size((7,))))
    blocks = lay_out(formats, routes.send_counts)
    buffer = torch.zeros(blocks.num_words, dtype=torch.int64, device=device)
    generator = torch.Generator().manual_seed(seed)
    for number in range(2):
        for _, block in blocks.blocks(buffer, number, routes.source):
            block.copy_(torch.randn(block.shape, generator=generator))
    return table.num_source, routes, blocks, buffer


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_kernel_has_the_bits_of_one_addition_per_peer(dtype):
    num_terms = 0
    for seed in range(6):
        for rank in range(4):
            num_rows, routes, blocks, buffer = returned(seed, rank, "cuda")
            _, host_routes, _, host_buffer = returned(seed, rank, "cpu")
            for number in range(2):
                into = torch.randn(num_rows, *blocks.formats[number].shape).to(dtype)
                fused = into.cuda()
                assert can_add_segments(fused, blocks, number)
                add_segments(fused, buffer, blocks, number, routes)
                add_partials(into, host_buffer, blocks, number, host_routes, average=False)
                assert torch.equal(fused.cpu(), into), (seed, rank, number)
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


def test_blocks_are_aligned_where_one_peer_sends_all():
    formats = (RowFormat(torch.bfloat16, torch.Size((1, 9))), RowFormat(torch.float32, torch.Size((3,))))
    blocks = lay_out(formats, (0, 7, 0))
    assert blocks.words_per_peer == (0, 32 - 5, 0)
    assert [starts[1] * 8 % 128 for starts in blocks.first_words] == [0, 0]
    buffer = torch.zeros(blocks.num_words, dtype=torch.int64)
    blocks.block(buffer, 0, 1).fill_(1)
    assert not blocks.block(buffer, 1, 1).any()
