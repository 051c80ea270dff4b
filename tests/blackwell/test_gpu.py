# SPDX-License-Identifier: Apache-2.0
"""Both backends on a GPU against the dense float64 oracle; the most basic cases come first.

Each kernel compiles for 2 to 10 seconds where the cache on disk doesn't have it, so that combinations are few.
"""

from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import numpy as np
import pytest
import torch

from magi_attention.common import workloads
from magi_attention.common.slices import SliceTable
from magi_attention.functional import flex_flash_attn_func
from magi_attention.kernels.merge import merge_partials
from magi_attention.kernels.protocol import AttentionCall, AttentionRequest, PrecompileCase
from magi_attention.kernels.speeds import arch_of
from magi_attention.testing.masks import MASK_FAMILIES
from magi_attention.testing.metric import assert_within_pytorch_error
from magi_attention.testing.oracle import dense_attention, dense_mask, masked_attention
from magi_attention.testing.stages import Inputs, assert_stage_is_right, random_inputs, run_dense, run_stage
from magi_kernels_blackwell import CUDNN_FLEX_BACKEND, FLASH_ATTENTION_4_BACKEND
from magi_kernels_blackwell.cases import call_of, tensors_of
from tests.blackwell.matrix import keep_in
from tests.blackwell.warm import SMALL_AND_ODD

BF16 = torch.bfloat16

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]

BACKENDS = [CUDNN_FLEX_BACKEND, FLASH_ATTENTION_4_BACKEND]
of_each_backend = pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)

# No kernel knows this mask itself: rows without keys, rows with several intervals, keys that nobody sees.
IRREGULAR = [[0, 200, 0, 300, 0], [200, 600, 100, 500, 1], [620, 640, 300, 340, 3], [620, 640, 0, 40, 2]]


def inputs(
    num_q: int,
    num_k: int | None = None,
    *,
    dims: tuple[int, int] = (128, 128),
    heads: tuple[int, int] = (4, 2),
    dtype: torch.dtype = BF16,
) -> Inputs:
    return random_inputs(num_q, num_q if num_k is None else num_k, heads=heads, dims=dims, dtype=dtype, device="cuda")


def skip_unless_supported(backend, x: Inputs, **changes: object) -> None:
    for direction in ("forward", "backward"):
        request = AttentionRequest.of_tensors(x.q, x.k, x.v, **changes)
        if not (support := backend.supports(request.toward(direction))):
            pytest.skip(f"{backend.name}: {support.reason}")


@of_each_backend
def test_plain_request_is_supported(backend):
    x = inputs(1)
    support = backend.supports(AttentionRequest.of_tensors(x.q, x.k, x.v))
    assert support, support.reason


@of_each_backend
def test_irregular_mask(backend):
    assert_stage_is_right(backend, inputs(700), SliceTable(IRREGULAR))


@of_each_backend
@pytest.mark.parametrize("family", MASK_FAMILIES)
def test_families(backend, family):
    for total in (333, 1024):
        slices = MASK_FAMILIES[family](total, np.random.default_rng(total))
        assert_stage_is_right(backend, inputs(total), slices)


@of_each_backend
@pytest.mark.parametrize("dims", [(64, 64), (96, 96), (192, 128), (192, 192), (256, 256)], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)], ids=str)
def test_head_dims(backend, dims, heads):
    x = inputs(700, dims=dims, heads=heads)
    skip_unless_supported(backend, x)
    assert_stage_is_right(backend, x, SliceTable(IRREGULAR))


@pytest.mark.parametrize(("dims", "heads"), SMALL_AND_ODD, ids=str)
def test_small_and_odd_head_dims_by_cudnn(dims, heads):
    x = inputs(700, dims=dims, heads=heads)
    skip_unless_supported(CUDNN_FLEX_BACKEND, x)
    assert_stage_is_right(CUDNN_FLEX_BACKEND, x, SliceTable(IRREGULAR))


@of_each_backend
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1)], ids=str)
def test_heads_in_float16(backend, heads):
    for rows in (IRREGULAR, [[0, 700, 0, 700, 1]]):
        assert_stage_is_right(backend, inputs(700, heads=heads, dtype=torch.float16), SliceTable(rows))


@of_each_backend
@pytest.mark.parametrize(("num_q", "num_k"), [(300, 900), (900, 300), (1, 700), (700, 1), (129, 257)])
def test_unequal_lengths(backend, num_q, num_k):
    for kind in (0, 1):
        assert_stage_is_right(backend, inputs(num_q, num_k), SliceTable([[0, num_q, 0, num_k, kind]]))
    assert_stage_is_right(
        backend,
        inputs(num_q, num_k),
        SliceTable([[0, num_q // 2, 0, num_k, 1], [num_q // 2, num_q, num_k // 2, num_k, 2]]),
    )


@of_each_backend
@pytest.mark.parametrize("rows", [IRREGULAR, [[0, 700, 0, 700, 1]], [[0, 300, 0, 300, 1], [300, 700, 300, 700, 1]]])
def test_later_launches_take_their_own_tensors(backend, rows):
    """What was found out for the first call serves others of the same shapes, also without a gradient of lse."""
    slices, scale = SliceTable(rows), 0.1
    first, second = (
        inputs(700),
        random_inputs(700, 700, heads=(4, 2), dims=(128, 128), dtype=BF16, device="cuda", seed=1),
    )
    run_stage(backend, first, AttentionCall(slices, 0.3))
    call = AttentionCall(slices, scale)
    result = backend.forward(second.q, second.k, second.v, call)
    tensors = (second.dout, second.q, second.k, second.v, result.out, result.lse)
    gradients = [backend.backward(*tensors, dlse, call) for dlse in (None, torch.zeros_like(result.lse))]
    without_dlse = second._replace(dlse=torch.zeros_like(second.dlse))
    truth, plain = (run_dense(without_dlse, slices, scale, 0.0, oracle=oracle) for oracle in (True, False))
    for each in gradients:
        for ours, reference, pytorch in zip(
            (*result[:2], *each), truth[:2] + truth[3:], plain[:2] + plain[3:], strict=True
        ):
            assert_within_pytorch_error(ours, reference, pytorch)


@of_each_backend
@pytest.mark.parametrize("rows", [IRREGULAR, [[0, 700, 0, 700, 1]]])
def test_strided_and_broadcast_inputs(backend, rows):
    slices, call = SliceTable(rows), AttentionCall(SliceTable(rows), 0.1)
    x = inputs(700)
    packed = torch.cat([x.q, x.k, x.v], dim=1)
    q, k, v = packed[:, :4], packed[:, 4:6], packed[:, 6:]
    dout = x.dout[:, :1, :1].expand_as(x.dout)
    same = x._replace(dout=dout.contiguous())
    for strided, whole in zip(
        run_stage(backend, Inputs(q, k, v, dout, x.dlse), call),
        run_stage(backend, same, AttentionCall(slices, 0.1)),
        strict=True,
    ):
        for a, b in zip(strided, whole, strict=True):
            assert a is None or torch.allclose(a.float(), b.float(), rtol=2e-2, atol=2e-2)


@of_each_backend
@pytest.mark.parametrize("rows", [IRREGULAR, [[0, 700, 0, 700, 1]]])
def test_other_streams_and_graphs(backend, rows):
    """Tables made on one stream serve launches on another, and launches can be captured and replayed."""
    x, call = inputs(700), AttentionCall(SliceTable(rows), 0.1)
    expected = backend.forward(x.q, x.k, x.v, call)
    gradients = backend.backward(x.dout, x.q, x.k, x.v, expected.out, expected.lse, None, call)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results = [backend.forward(x.q, x.k, x.v, call)]
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        captured = backend.forward(x.q, x.k, x.v, call)
        captured_gradients = backend.backward(x.dout, x.q, x.k, x.v, captured.out, captured.lse, None, call)
    for tensor in (*captured[:2], *captured_gradients):
        tensor.zero_()
    graph.replay()
    results.append(captured)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for result in results for a, b in zip(result[:2], expected[:2], strict=True))
    for ours, other in zip(captured_gradients, gradients, strict=True):
        assert torch.allclose(ours.float(), other.float(), rtol=2e-2, atol=2e-2)


@of_each_backend
@pytest.mark.parametrize("family", ["causal", "block_causal", "sliding_window"])
def test_more_work_than_multiprocessors(backend, family):
    slices = MASK_FAMILIES[family](3000, np.random.default_rng(1))
    assert_stage_is_right(backend, inputs(3000, heads=(16, 8)), slices)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("mask", ["swa_causal_1024", "varlen_causal"])
def test_backends_agree_on_long_sequences(mask, dim):
    """Longer than the oracle can be. Results begin as NaN, so that what a kernel left out would show."""
    tokens = 16384
    x = random_inputs(tokens, tokens, heads=(16, 2), dims=(dim, dim), dtype=BF16, device="cuda")
    call = AttentionCall(workloads.make(mask, tokens), dim**-0.5)
    expected, gradients = run_stage(FLASH_ATTENTION_4_BACKEND, x, call)
    for _ in range(3):
        poison = [torch.full_like(each, torch.nan) for each in (x.q, x.k, x.v)]
        del poison
        result, ours = run_stage(CUDNN_FLEX_BACKEND, x, call)
        for a, b in zip((*result[:2], *ours), (*expected[:2], *gradients), strict=True):
            assert (a.float() - b.float()).norm() <= 1e-2 * b.float().norm()


@of_each_backend
@pytest.mark.parametrize(("num_q", "num_k"), [(0, 5), (5, 0), (5, 5)])
def test_without_any_pair(backend, num_q, num_k):
    x = inputs(num_q, num_k)
    result, gradients = run_stage(backend, x, AttentionCall(SliceTable([]), 1.0))
    assert not result.out.any()
    assert (result.lse == -torch.inf).all()
    assert not any(gradient.any() for gradient in gradients)


@of_each_backend
def test_many_intervals_per_row(backend):
    slices = SliceTable([[0, 400, k, k + 7, 0] for k in range(0, 400, 20)])
    assert_stage_is_right(backend, inputs(400), slices)


@of_each_backend
def test_long_document(backend):
    """Tiles of all kinds in one row, and more work than multiprocessors."""
    total = 4096
    rows = [[0, 1000, 0, 1000, 1], [1000, total, 0, 500, 0], [1000, total, 1000, total, 1]]
    assert_stage_is_right(backend, inputs(total, heads=(8, 2)), SliceTable(rows))


@of_each_backend
def test_same_bits_on_every_run(backend):
    x = inputs(1024)
    call = AttentionCall(MASK_FAMILIES["block_causal"](1024, np.random.default_rng(0)), 0.125, deterministic=True)
    result = [backend.forward(x.q, x.k, x.v, call)[:2] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*result, strict=True))
    skip_unless_supported(backend, x, deterministic=True)
    (first, gradients), (second, gradients2) = run_stage(backend, x, call), run_stage(backend, x, call)
    assert all(torch.equal(a, b) for a, b in zip((*first[:2], *gradients), (*second[:2], *gradients2), strict=True))


def test_softcap_by_flash_attention_4():
    for rows in (IRREGULAR, [[0, 700, 0, 700, 1]]):
        assert_stage_is_right(FLASH_ATTENTION_4_BACKEND, inputs(700), SliceTable(rows), softcap=1.5)


def test_max_logits_and_spared_multiprocessors_by_cudnn():
    x = inputs(700)
    assert_stage_is_right(CUDNN_FLEX_BACKEND, x, SliceTable(IRREGULAR), max_logits=True)
    calls = [AttentionCall(SliceTable(IRREGULAR), 0.1, sm_margin=margin) for margin in (0, 100)]
    whole, spared = (CUDNN_FLEX_BACKEND.forward(x.q, x.k, x.v, call) for call in calls)
    assert torch.equal(whole.out, spared.out)


@of_each_backend
def test_two_stages_merge_and_their_gradients_add_up(backend):
    total, scale = 600, 0.125
    slices = MASK_FAMILIES["prefix_lm"](total, np.random.default_rng(2))
    x = inputs(total)
    calls = [AttentionCall(part, scale) for part in (slices.clip_columns(0, 250), slices.clip_columns(250, total))]
    (out, lse, _), (out2, lse2, _) = (backend.forward(x.q, x.k, x.v, call) for call in calls)
    out, lse = merge_partials(out, lse, out2, lse2)
    gradients = [backend.backward(x.dout, x.q, x.k, x.v, out, lse, x.dlse, call) for call in calls]
    actual = [out, lse, *(a.float() + b.float() for a, b in zip(*gradients, strict=True))]
    truth, plain = (run_dense(x, slices, scale, 0.0, oracle=oracle) for oracle in (True, False))
    del truth[2], plain[2]  # the largest scores
    for ours, reference, pytorch in zip(actual, truth, plain, strict=True):
        assert_within_pytorch_error(ours, reference, pytorch)


@of_each_backend
def test_functional_interface_with_a_sink(backend, monkeypatch):
    monkeypatch.setenv("MAGI_ATTENTION_KERNEL_BACKEND", backend.name)
    x = inputs(333)
    slices = SliceTable([[0, 100, 0, 100, 1], [100, 333, 50, 333, 1]])
    sink = torch.randn(1, 4, device="cuda")
    q_ranges, k_ranges = (
        torch.tensor(slices.rows[:, cut], dtype=torch.int32, device="cuda") for cut in (slice(0, 2), slice(2, 4))
    )
    kinds = torch.ones(2, dtype=torch.int32, device="cuda")

    def differentiate(dtype, attend):
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in x[:3]]
        own_sink = sink.detach().to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
        out, lse = attend(*leaves, own_sink)
        return [out, lse, *torch.autograd.grad((out, lse), (*leaves, own_sink), (x.dout.to(out), x.dlse.to(lse)))]

    def ours(q, k, v, own_sink):
        out, meta = flex_flash_attn_func(q, k, v, q_ranges, k_ranges, kinds, sink=own_sink)
        return out, meta.lse

    mask = dense_mask(slices, 333, 333, "cuda")
    truth = differentiate(torch.float64, lambda q, k, v, s: dense_attention(q, k, v, slices, sink=s)[:2])
    plain = differentiate(torch.bfloat16, lambda q, k, v, s: masked_attention(q, k, v, mask, sink=s)[:2])
    for actual, reference, pytorch in zip(differentiate(torch.bfloat16, ours), truth, plain, strict=True):
        assert_within_pytorch_error(actual, reference, pytorch)


@of_each_backend
def test_precompiled_kernels_are_those_that_are_launched(backend, tmp_path):
    """Each step in a process of its own; the launches write nothing into the cache, so they found all there."""
    arch = arch_of(torch.device("cuda"))
    cases = [
        PrecompileCase(arch, torch.bfloat16, 8, 2, 128, 128, direction, variant)
        for variant in ("", "causal", "documents window")
        for direction in ("forward", "backward")
    ]
    written = []
    for step in (backend.precompile, partial(launch_case, backend)):
        with ProcessPoolExecutor(1, get_context("spawn"), keep_in, (tmp_path,)) as pool:
            list(pool.map(step, cases))
        written.append({path.relative_to(tmp_path) for path in tmp_path.rglob("*.o")})
    assert written[0]
    assert written[1] == written[0]


def launch_case(backend, case: PrecompileCase) -> None:
    call, x = call_of(case), tensors_of(case)
    lse = x.lse.T.zero_()
    if case.direction == "forward":
        backend.forward(x.q, x.k, x.v, call)
    else:
        backend.backward(x.dout, x.q, x.k, x.v, x.out, lse, None, call)
    torch.cuda.synchronize()


def test_other_users_of_flash_attention_4_get_its_own_masks():
    """After the mask class was bound, a mask function of somebody else's is applied as it is."""
    from flash_attn.cute.interface import _flash_attn_fwd

    x = inputs(512, heads=(2, 2))
    scale, causal = 128**-0.5, SliceTable([[0, 512, 0, 512, 1]])
    FLASH_ATTENTION_4_BACKEND.forward(x.q, x.k, x.v, AttentionCall(SliceTable([[0, 512, 0, 400, 1]]), scale))
    out = _flash_attn_fwd(*(y[None] for y in (x.q, x.k, x.v)), softmax_scale=scale, causal=True)[0][0]
    truth, plain = (run_dense(x, causal, scale, 0.0, oracle=oracle)[0] for oracle in (True, False))
    assert_within_pytorch_error(out, truth, plain)
