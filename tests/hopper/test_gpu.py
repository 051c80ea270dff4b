# SPDX-License-Identifier: Apache-2.0
"""The kernels on a Hopper GPU against the dense float64 oracle; the most basic cases come first."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention.common.slices import SliceTable
from magi_attention.kernels.merge import merge_partials
from magi_attention.kernels.protocol import AttentionCall, AttentionRequest, WritesInPlace
from magi_attention.testing.masks import MASK_FAMILIES, rectangular_masks
from magi_attention.testing.metric import assert_within_pytorch_error
from magi_attention.testing.oracle import dense_attention, dense_mask, masked_attention
from magi_attention.testing.stages import Inputs, random_inputs
from magi_kernels_hopper import BACKEND, tables
from magi_kernels_hopper.forward import launch_forward
from magi_kernels_hopper.variants import HEAD_DIMS, TALL_SIZES

pytestmark = pytest.mark.gpu

# Rows without keys, rows with several intervals, keys that nobody sees.
IRREGULAR_ROWS = [[0, 200, 0, 300, 0], [200, 600, 100, 500, 1], [620, 640, 300, 340, 3], [620, 640, 0, 40, 2]]
IRREGULAR = SliceTable(IRREGULAR_ROWS)


@pytest.fixture(autouse=True, scope="module")
def hopper_gpu():
    request = AttentionRequest(torch.device("cuda"), torch.bfloat16, 4, 2, 128, 128)
    if not (support := BACKEND.supports(request)):
        pytest.skip(support.reason)


def inputs(num_q, num_k=None, *, heads=(4, 2), dims=(128, 128), dtype=torch.bfloat16) -> Inputs:
    return random_inputs(num_q, num_q if num_k is None else num_k, heads=heads, dims=dims, dtype=dtype, device="cuda")


def assert_right(x: Inputs, slices: SliceTable, **options) -> None:
    scale = options.pop("softmax_scale", x.q.shape[2] ** -0.5)
    softcap = options.get("softcap", 0.0)
    result = BACKEND.forward(x.q, x.k, x.v, AttentionCall(slices, scale, **options))
    assert result.out.dtype == x.q.dtype
    scoring = {"softmax_scale": scale, "softcap": softcap}
    exact = dense_attention(x.q, x.k, x.v, slices, **scoring)
    mask = dense_mask(slices, x.q.shape[0], x.k.shape[0], "cuda")
    plain = masked_attention(x.q, x.k, x.v, mask, **scoring)
    for name, mine, truth, torchs in zip(("out", "lse", "max_logits"), result, exact, plain, strict=True):
        if mine is not None:
            assert_within_pytorch_error(mine, truth, torchs, name=name)


def test_one_tile():
    assert_right(inputs(128, heads=(1, 1)), SliceTable([[0, 128, 0, 128, 0]]))


def test_many_tiles():
    assert_right(inputs(1000, 3000, heads=(2, 1)), SliceTable([[0, 1000, 0, 3000, 0]]))


@pytest.mark.parametrize("tall", [False, True], ids=["low", "tall"])
@pytest.mark.parametrize("family", MASK_FAMILIES)
def test_families(family, tall, monkeypatch):
    monkeypatch.setattr(tables, "TALL_PAIRS", 100.0 if tall else 0.0)
    for total in (333, 1024):
        assert_right(inputs(total), MASK_FAMILIES[family](total, np.random.default_rng(total)))


@settings(max_examples=300, deadline=None)
@given(rectangular_masks(700), st.sampled_from([(1, 1), (2, 1), (7, 1), (8, 2)]), st.sampled_from([64, 128]))
def test_random_masks(mask, heads, dim):
    (num_q, num_k), slices = mask
    assert_right(inputs(num_q, num_k, heads=heads, dims=(dim, dim)), slices, max_logits=True)


@pytest.mark.parametrize("dims", HEAD_DIMS, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (7, 1), (8, 1), (16, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["low", "tall", "softcap"])
def test_every_kernel(dims, heads, dtype, kind, monkeypatch):
    softcap = 2.0 if kind == "softcap" else 0.0
    if kind == "tall" and dims not in TALL_SIZES:
        pytest.skip("there is no tall kernel")
    monkeypatch.setattr(tables, "TALL_PAIRS", 100.0 if kind == "tall" else 0.0)
    x = inputs(700, dims=dims, heads=heads, dtype=dtype)
    assert_right(x, SliceTable(IRREGULAR_ROWS), softcap=softcap, max_logits=True)


@pytest.mark.parametrize("dims", HEAD_DIMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["low", "tall", "softcap"])
def test_every_kernel_in_parts(dims, dtype, kind, monkeypatch):
    """Tiles of queries that are cut along their keys, one of them into 1, one into many."""
    if kind == "tall" and dims not in TALL_SIZES:
        pytest.skip("there is no tall kernel")
    monkeypatch.setattr(tables, "TALL_PAIRS", 100.0 if kind == "tall" else 0.0)
    monkeypatch.setattr(tables, "most_boxes", lambda *_: 2)
    x = inputs(700, dims=dims, heads=(6, 2), dtype=dtype)
    assert_right(x, SliceTable(IRREGULAR_ROWS), softcap=2.0 if kind == "softcap" else 0.0, max_logits=True)


@pytest.mark.parametrize("limit", [1, 4])
@pytest.mark.parametrize("family", MASK_FAMILIES)
def test_families_in_parts(family, limit, monkeypatch):
    monkeypatch.setattr(tables, "most_boxes", lambda *_: limit)
    assert_right(inputs(1024), MASK_FAMILIES[family](1024, np.random.default_rng(1)))


@pytest.mark.parametrize(("num_q", "num_k"), [(1, 20000), (40, 9000)])
def test_few_queries_are_cut(num_q, num_k):
    x, slices = inputs(num_q, num_k, heads=(16, 2)), SliceTable([[0, num_q, 0, num_k, 1]])
    assert_right(x, slices)
    first, second = (BACKEND.forward(x.q, x.k, x.v, AttentionCall(slices, 0.1)) for _ in range(2))
    assert torch.equal(first.out, second.out)
    assert torch.equal(first.lse, second.lse)


@pytest.mark.parametrize("num_k", [300, 20000], ids=["whole", "cut"])
def test_what_is_no_number_stays_so(num_k):
    x, slices = inputs(3, num_k, heads=(16, 2)), SliceTable([[0, 3, 0, num_k, 0]])
    x.k[5, 0] = torch.nan  # for the first eight query heads
    x.q[2, 15] = torch.nan
    result = BACKEND.forward(x.q, x.k, x.v, AttentionCall(slices, 0.1))
    is_nan = torch.zeros(3, 16, dtype=torch.bool, device="cuda")
    is_nan[:, :8] = is_nan[2, 15] = True
    assert torch.equal(result.out.isnan().all(-1), is_nan)
    assert torch.equal(result.out.isnan().any(-1), is_nan)
    assert torch.equal(result.lse.isnan(), is_nan)


@pytest.mark.parametrize(("num_q", "num_k"), [(300, 900), (900, 300), (1, 700), (700, 1), (129, 257), (5, 0)])
def test_unequal_lengths(num_q, num_k):
    for kind in (0, 1):
        assert_right(inputs(num_q, num_k), SliceTable([[0, num_q, 0, num_k, kind]]).without_empty(), max_logits=True)


def test_no_queries():
    x = inputs(0, 5)
    result = BACKEND.forward(x.q, x.k, x.v, AttentionCall(SliceTable([]), 1.0, max_logits=True))
    assert result.out.shape == x.q.shape
    assert result.max_logits.tolist() == [-torch.inf] * 4


@pytest.mark.parametrize("softmax_scale", [1.0, 0.0, -0.1])
def test_scales(softmax_scale):
    assert_right(inputs(700), IRREGULAR, softmax_scale=softmax_scale, max_logits=True)


@pytest.mark.parametrize("step", [0.5, 4.0, 40.0], ids=["below", "sometimes", "always"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tall", [False, True], ids=["low", "tall"])
def test_scores_that_grow(step, dtype, tall, monkeypatch):
    """From tile to tile, by less or more than what the tall kernel lets them before it scales what it summed up."""
    monkeypatch.setattr(tables, "TALL_PAIRS", 100.0 if tall else 0.0)
    x = inputs(400, 1200, heads=(8, 1), dtype=dtype)
    x.q[..., 1:] *= 0.1
    x.q[..., 0] = 1
    x.k[..., 0] = step * torch.arange(1200, device="cuda")[:, None] / 80 + 0.5 * x.k[..., 0]
    slices = SliceTable([[0, 400, 0, 1200, 1]])
    assert_right(x, slices, softmax_scale=1.0)
    assert_right(x, slices, softmax_scale=1.0, max_logits=True)


def test_without_any_pair():
    assert_right(inputs(300), SliceTable([]), max_logits=True)


def test_many_intervals_per_row():
    assert_right(inputs(400), SliceTable([[0, 400, k, k + 7, 0] for k in range(0, 400, 20)]))


def test_fewer_multiprocessors():
    assert_right(inputs(2000, heads=(8, 8)), SliceTable([[0, 2000, 0, 2000, 1]]), sm_margin=120)


def test_views_are_read_in_place():
    qkv = torch.randn(700, 12, 128, device="cuda").bfloat16()
    q, k, v = qkv[:, :8], qkv[:, 8:10], qkv[:, 10:]
    call = AttentionCall(IRREGULAR, 0.1)
    torch.testing.assert_close(
        BACKEND.forward(q, k, v, call)[:2],
        BACKEND.forward(q.contiguous(), k.contiguous(), v.contiguous(), call)[:2],
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("layout", ["shifted", "expanded"])
def test_queries_that_the_copy_engine_cannot_read(layout):
    """They are copied, also where float32 results need no engine."""
    x, call = inputs(700), AttentionCall(IRREGULAR, 0.1)
    if layout == "shifted":
        q = x.q.new_empty(x.q.numel() + 1)[1:].view(x.q.shape).copy_(x.q)
    else:
        q = x.q[:, :1].expand_as(x.q)
    for dtype in (x.q.dtype, torch.float32):
        results = []
        for queries in (q, q.clone(memory_format=torch.contiguous_format)):
            out, lse = x.q.new_empty(x.q.shape, dtype=dtype), x.q.new_empty(x.q.shape[:2], dtype=torch.float32)
            launch_forward(queries, x.k, x.v, call, out, lse, merge=False)
            results.append((out, lse))
        torch.testing.assert_close(*results, rtol=0, atol=0)


def test_same_bits_in_every_run_and_on_every_stream():
    x, call = inputs(3000, heads=(8, 2)), AttentionCall(SliceTable([[0, 3000, 0, 3000, 1]]), 0.1)
    first = BACKEND.forward(x.q, x.k, x.v, call)
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    results = []
    for stream in streams * 3:
        with torch.cuda.stream(stream):
            results.append(BACKEND.forward(x.q, x.k, x.v, call))
    torch.cuda.synchronize()
    for result in results:
        assert torch.equal(result.out, first.out)
        assert torch.equal(result.lse, first.lse)


@pytest.mark.parametrize("limit", [None, 2])
def test_captured_in_a_graph(limit, monkeypatch):
    monkeypatch.setattr(tables, "most_boxes", lambda *_: limit)
    x, call = inputs(700), AttentionCall(SliceTable(IRREGULAR_ROWS), 0.1)
    expected = BACKEND.forward(x.q, x.k, x.v, call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = BACKEND.forward(x.q, x.k, x.v, call)
    for _ in range(3):
        captured.out.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured.out, expected.out)


@pytest.mark.parametrize("limit", [None, 2])
def test_runs_of_larger_tensors_are_written(limit, monkeypatch):
    """The results are where they were wanted, in any layout of lse, and nothing beside them changes."""
    monkeypatch.setattr(tables, "most_boxes", lambda *_: limit)
    x, call = inputs(700), AttentionCall(SliceTable(IRREGULAR_ROWS), 0.1)
    expected = BACKEND.forward(x.q, x.k, x.v, call)
    assert isinstance(BACKEND, WritesInPlace)
    for by_head in (False, True):
        out, lse = x.q.new_full((900, 4, 128), 7.0), torch.full((900, 4), 7.0, device="cuda")
        lse = lse.T.contiguous().T if by_head else lse
        result = BACKEND.forward_into(out[100:800], lse[100:800], x.q, x.k, x.v, call)
        for whole, target, got, right in zip((out, lse), (out[100:800], lse[100:800]), result, expected, strict=False):
            assert got.data_ptr() == target.data_ptr()
            assert torch.equal(target, right)
            assert (whole[:100] == 7.0).all()
            assert (whole[800:] == 7.0).all()


@pytest.mark.parametrize("limit", [None, 2])
def test_merging_where_it_is_written(limit, monkeypatch):
    """What an earlier stage left is merged with; rows without new keys keep their bits."""
    monkeypatch.setattr(tables, "most_boxes", lambda *_: limit)
    x = inputs(700)
    earlier, later = SliceTable([[0, 650, 400, 700, 0]]), SliceTable([[100, 700, 0, 400, 1]])
    out, lse = x.q.new_empty(x.q.shape, dtype=torch.float32), x.q.new_empty(x.q.shape[:2], dtype=torch.float32)
    launch_forward(x.q, x.k, x.v, AttentionCall(earlier, 0.1), out, lse, merge=False)
    first = out.clone(), lse.clone()
    second = torch.empty_like(out), torch.empty_like(lse)
    launch_forward(x.q, x.k, x.v, AttentionCall(later, 0.1), *second, merge=False)
    launch_forward(x.q, x.k, x.v, AttentionCall(later, 0.1), out, lse, merge=True)
    expected = merge_partials(*first, *second)
    torch.testing.assert_close((out, lse), expected, rtol=1e-5, atol=1e-5)
    untouched = second[1] == -torch.inf
    assert torch.equal(out[untouched], first[0][untouched])
