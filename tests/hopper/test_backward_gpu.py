# SPDX-License-Identifier: Apache-2.0
"""The backward kernels on a GPU against the dense float64 oracle; the most basic cases come first.

The forward pass is the oracle's, so that nothing but the gradients is at stake.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention.common.slices import SliceTable
from magi_attention.kernels.protocol import AttentionCall, AttentionRequest
from magi_attention.testing.masks import MASK_FAMILIES, rectangular_masks
from magi_attention.testing.metric import assert_within_pytorch_error
from magi_attention.testing.oracle import dense_mask, masked_attention
from magi_attention.testing.stages import Inputs, random_inputs
from magi_kernels_hopper import BACKEND, backward
from magi_kernels_hopper.backward_order import WorkSizes, order_work
from magi_kernels_hopper.variants import BACKWARD_SIZES, FINE_SIZES, backward_variants

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]

# Rows without keys, rows with several intervals, keys that nobody sees, ragged ends.
IRREGULAR = [[0, 200, 0, 300, 0], [200, 600, 100, 500, 1], [620, 640, 300, 340, 3], [620, 640, 0, 40, 2]]


def inputs(num_q, num_k=None, *, dims=(128, 128), heads=(4, 2), dtype=torch.bfloat16) -> Inputs:
    x = random_inputs(num_q, num_q if num_k is None else num_k, heads=heads, dims=dims, dtype=dtype, device="cuda")
    if not (support := BACKEND.supports(AttentionRequest.of_tensors(x.q, x.k, x.v).toward("backward"))):
        pytest.skip(support.reason)
    return x


def check(x: Inputs, slices: SliceTable, *, scale=None, softcap=0.0, deterministic=False, sm_margin=0) -> None:
    """Compare the gradients with the oracle's, through out and lse; none may be off by more than twice PyTorch's."""
    scale = x.q.shape[2] ** -0.5 if scale is None else scale
    mask = dense_mask(slices, len(x.q), len(x.k), "cuda")

    def dense(dtype):
        leaves = [each.to(dtype).requires_grad_() for each in (x.q, x.k, x.v)]
        out, lse, _ = masked_attention(*leaves, mask, softmax_scale=scale, softcap=softcap)
        seen = lse.isfinite()
        loss = (out * x.dout.to(dtype)).sum().double() + (lse.masked_fill(~seen, 0).double() * x.dlse).sum()
        return out.detach(), lse.detach(), torch.autograd.grad(loss, leaves)

    out, lse, expected = dense(torch.float64)
    _, _, plain = dense(x.q.dtype)
    call = AttentionCall(slices, scale, softcap, deterministic, sm_margin=sm_margin)
    arguments = x.dout, x.q, x.k, x.v, out.to(x.q.dtype), lse.float(), x.dlse, call
    got = BACKEND.backward(*arguments)
    for name, a, b, c in zip(("dq", "dk", "dv"), got, expected, plain, strict=True):
        assert_within_pytorch_error(a, b, c, name=name)
    if deterministic:
        again = BACKEND.backward(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@contextmanager
def only_kernels(*, fine: bool) -> Iterator[None]:
    """Let the mask decide nothing: the coarse kernels, or the fine ones, are the only ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backward, "backward_variants", lambda *args: backward_variants(*args)[-1 if fine else 0 :][:1])
        yield


@pytest.fixture(params=[False, True], ids=["coarse", "fine"])
def only(request):
    with only_kernels(fine=request.param):
        yield


def block_sparse(num_blocks: int, share: float, size: int = 64) -> SliceTable:
    """Blocks of ``size`` queries and keys, of which each counts with a chance of ``share``."""
    row, column = np.nonzero(np.random.default_rng(0).random((num_blocks, num_blocks)) < share)
    return SliceTable(np.column_stack([row, row + 1, column, column + 1, np.zeros_like(row)]) * [[size] * 4 + [1]])


@pytest.mark.parametrize(
    ("num_q", "num_k", "heads"), [(64, 128, (1, 1)), (8, 128, (8, 1)), (256, 128, (1, 1)), (64, 384, (1, 1))]
)
def test_few_tiles(num_q, num_k, heads, only):
    check(inputs(num_q, num_k, heads=heads), SliceTable([[0, num_q, 0, num_k, 0]]))


@pytest.mark.parametrize("dims", BACKWARD_SIZES, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (8, 1), (6, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_irregular_mask(dims, heads, dtype, softcap):
    check(inputs(700, dims=dims, heads=heads, dtype=dtype), SliceTable(IRREGULAR), softcap=softcap)


@pytest.mark.parametrize("dims", BACKWARD_SIZES, ids=str)
def test_deterministic(dims):
    check(inputs(1500, dims=dims, heads=(8, 2)), SliceTable([[0, 1500, 0, 1500, 1]]), deterministic=True)
    check(inputs(700, dims=dims, heads=(8, 2)), SliceTable(IRREGULAR), deterministic=True)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("size", [64, 48, 16])
@pytest.mark.parametrize("heads", [(16, 2), (4, 4), (6, 1)], ids=str)
def test_block_sparse(heads, size, deterministic, only):
    check(inputs(32 * size, heads=heads), block_sparse(32, 0.1, size), deterministic=deterministic)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (8, 1), (6, 2), (7, 1)], ids=str)
@pytest.mark.parametrize("dims", FINE_SIZES, ids=str)
def test_fine_kernels(dims, heads, dtype):
    x = inputs(700, dims=dims, heads=heads, dtype=dtype)
    with only_kernels(fine=True):
        check(x, SliceTable(IRREGULAR))
        check(x, SliceTable(IRREGULAR), scale=-0.2, deterministic=True)
        check(x, SliceTable(IRREGULAR), sm_margin=100)


@pytest.mark.parametrize("family", MASK_FAMILIES)
def test_families(family, only):
    for total in (333, 1024):
        check(inputs(total), MASK_FAMILIES[family](total, np.random.default_rng(total)))


@pytest.mark.parametrize("scale", [-0.2, 0.0, 1.0])
def test_scales(scale, only):
    check(inputs(300), SliceTable([[0, 300, 0, 300, 1]]), scale=scale)


def test_lse_is_read_in_place(only):
    """Any layout gives the same bits; rows of another tensor lie between those that are read."""
    x, call = inputs(700), AttentionCall(SliceTable(IRREGULAR), 0.1, deterministic=True)
    out, lse, _ = BACKEND.forward(x.q, x.k, x.v, call)
    expected = BACKEND.backward(x.dout, x.q, x.k, x.v, out, lse, x.dlse, call)
    wide = lse.new_full((900, 7), torch.nan)
    wide[100:800, 2:6] = lse
    for same in (lse.T.contiguous().T, wide[100:800, 2:6], wide.T.contiguous().T[100:800, 2:6], lse.double()):
        got = BACKEND.backward(x.dout, x.q, x.k, x.v, out, same, x.dlse, call)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_nothing_to_do():
    x = inputs(100)
    lse = x.q.new_full(x.q.shape[:2], -torch.inf, dtype=torch.float32)
    zeros = torch.zeros_like(x.q)
    got = BACKEND.backward(x.q, x.q, x.k, x.v, zeros, lse, None, AttentionCall(SliceTable([]), 1.0))
    assert not any(each.any() for each in got)
    got = BACKEND.backward(x.q[:0], x.q[:0], x.k, x.v, zeros[:0], lse[:0], None, AttentionCall(SliceTable([]), 1.0))
    assert not any(each.any() for each in got)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("rows", [[[0, 777, 0, 777, 1]], IRREGULAR], ids=["causal", "irregular"])
def test_heads_of_several_items(rows, dim, deterministic):
    """The gradients of keys of one head are the sum of several items'."""
    slices = SliceTable(rows)
    sizes = BACKWARD_SIZES[dim, dim]
    blocks = torch.cuda.get_device_properties(0).multi_processor_count
    sizes = WorkSizes(sizes.tile_m, sizes.tile_n, 2, 8, blocks)
    assert order_work(slices.bands(), 777, 777, sizes, ordered=deterministic).split
    check(inputs(777, dims=(dim, dim), heads=(16, 2)), slices, deterministic=deterministic)


def attended(x: Inputs, slices: SliceTable, **options) -> tuple:
    """The arguments of a backward pass."""
    call = AttentionCall(slices, x.q.shape[2] ** -0.5, **options)
    out, lse, _ = BACKEND.forward(x.q, x.k, x.v, call)
    return x.dout, x.q, x.k, x.v, out, lse, x.dlse, call


@pytest.mark.parametrize("dims", BACKWARD_SIZES, ids=str)
def test_a_stream_may_read_awaited_gradients_before_the_others_are_there(dims, only):
    """Again and again, in the order of launches; what it has read are the gradients."""
    slices, awaited = SliceTable([[0, 1500, 0, 1900, 1], [1500, 1600, 0, 1000, 0]]), ((0, 700), (1000, 1100))
    x, beside = inputs(1600, 2000, dims=dims, heads=(16, 2)), torch.cuda.Stream()
    arguments = attended(x, slices, first_keys=awaited)
    _, *expected = BACKEND.backward(*arguments)
    read, gradients = [], []

    def read_beside(dk, dv, rows_there):
        rows_there(beside)
        with torch.cuda.stream(beside):
            read.append([each[start:stop].clone() for each in (dk, dv) for start, stop in awaited])

    for _ in range(20):
        gradients.append(BACKEND.backward_keys_first(read_beside, None, *arguments)[1:])
    torch.cuda.synchronize()
    for copies, of_keys in zip(read, gradients, strict=True):
        runs = [each[start:stop] for each in of_keys for start, stop in awaited]
        assert all(torch.equal(a, b) for a, b in zip(copies, runs, strict=True))
        for a, b in zip(of_keys, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_awaited_gradients_are_there_before_the_others():
    x, beside = inputs(4096, dims=(128, 128), heads=(32, 4)), torch.cuda.Stream()
    arguments = attended(x, SliceTable([[0, 4096, 0, 4096, 0]]), first_keys=((0, 2048),))
    there, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def note(dk, dv, rows_there):
        rows_there(beside)
        there.record(beside)

    for _ in range(2):
        BACKEND.backward_keys_first(note, None, *arguments)
        done.record()
        torch.cuda.synchronize()
    assert there.elapsed_time(done) > 0


def test_a_captured_launch_promises_nothing():
    """A replay is not counted: what waits for it must be in the graph. Nor does one that adds up in order."""
    x, told = inputs(500), []
    arguments = attended(x, SliceTable([[0, 500, 0, 500, 1]]), first_keys=((0, 100),))
    ordered = attended(x, SliceTable([[0, 500, 0, 500, 1]]), deterministic=True, first_keys=((0, 100),))
    expected = BACKEND.backward_keys_first(lambda *gradients: told.append(len(gradients)), None, *ordered)
    BACKEND.backward(*arguments)  # uploads the mask's tables
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = BACKEND.backward_keys_first(lambda *gradients: told.append(len(gradients)), None, *arguments)
    graph.replay()
    assert told == [2, 2]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@settings(max_examples=300, deadline=None)
@given(rectangular_masks(400), st.sampled_from([(1, 1), (4, 2), (8, 1)]), st.booleans(), st.booleans())
def test_random_masks(mask, heads, deterministic, fine):
    (num_q, num_k), slices = mask
    with only_kernels(fine=fine):
        check(inputs(num_q, num_k, heads=heads), slices, deterministic=deterministic)
