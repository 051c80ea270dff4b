# SPDX-License-Identifier: Apache-2.0
"""Both backends on new threads, in memory that is used anew, and with tensors where kernels can't read them."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from magi_attention.common.slices import SliceTable
from magi_attention.kernels.protocol import AttentionCall, AttentionRequest
from magi_attention.testing.stages import Inputs, random_inputs, run_stage
from magi_kernels_blackwell import CUDNN_FLEX_BACKEND, FLASH_ATTENTION_4_BACKEND

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]

MASKS = {
    "irregular": [[0, 200, 0, 300, 0], [200, 600, 100, 500, 1], [620, 640, 300, 340, 3], [620, 640, 0, 40, 2]],
    "causal": [[0, 700, 0, 700, 1]],
    "documents": [[0, 300, 0, 300, 1], [300, 700, 300, 700, 1]],
}
of_each_mask = pytest.mark.parametrize("rows", MASKS.values(), ids=MASKS)


@pytest.fixture(params=[CUDNN_FLEX_BACKEND, FLASH_ATTENTION_4_BACKEND], ids=lambda backend: backend.name)
def backend(request):
    x = inputs(1)
    for direction in ("forward", "backward"):
        if not (support := request.param.supports(AttentionRequest.of_tensors(x.q, x.k, x.v).toward(direction))):
            pytest.skip(support.reason)
    return request.param


def inputs(length: int) -> Inputs:
    return random_inputs(length, length, heads=(4, 2), dims=(128, 128), dtype=torch.bfloat16, device="cuda")


def results_of(backend, x: Inputs, call: AttentionCall) -> list[Tensor]:
    result, gradients = run_stage(backend, x, call)
    return [result.out, result.lse, *gradients]


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


@of_each_mask
def test_the_first_thing_that_a_thread_does(backend, rows):
    """No CUDA call has made the GPU's context that of the thread, as in the backward pass of a first step."""
    x, call = inputs(700), AttentionCall(SliceTable(rows), 0.1)
    result, gradients = run_stage(backend, x, call)
    torch.cuda.synchronize()
    runs = {
        "forward": (lambda: backend.forward(x.q, x.k, x.v, call)[:2], result[:2]),
        "backward": (
            lambda: backend.backward(x.dout, x.q, x.k, x.v, result.out, result.lse, x.dlse, call),
            gradients,
        ),
    }
    for run, expected in runs.values():
        with ThreadPoolExecutor(1) as thread:
            found = thread.submit(run).result()
        torch.cuda.synchronize()
        assert_same([*found], [*expected])


@of_each_mask
def test_tables_that_are_dropped_while_launches_wait(backend, rows):
    """What is allocated next on the tables' stream must not lie where a launch on another stream still reads."""
    x = inputs(700)
    expected = results_of(backend, x, AttentionCall(SliceTable(rows), 0.1))
    stream = torch.cuda.Stream()
    for _ in range(5):
        call = AttentionCall(SliceTable(rows), 0.1)
        results_of(backend, x, call)  # makes the tables on the default stream
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            got = results_of(backend, x, call)
        call.slices.forget_derived()
        del call
        garbage = [
            torch.full((size,), -1, dtype=torch.int32, device="cuda") for size in (64, 256, 1024) for _ in range(99)
        ]
        torch.cuda.synchronize()
        assert_same(got, expected)
        del garbage


@of_each_mask
def test_tensors_that_are_not_aligned(backend, rows):
    """First the one, then the other kind is what a launch was prepared with; both have the results of aligned ones."""
    x = inputs(700)
    shifted = Inputs(*(each.new_empty(each.numel() + 1)[1:].view(each.shape).copy_(each) for each in x))
    expected = results_of(backend, x, AttentionCall(SliceTable(rows), 0.1))
    for order in ((x, shifted, x), (shifted, x, shifted)):
        call = AttentionCall(SliceTable(rows), 0.1)
        for each in order:
            assert_same(results_of(backend, each, call), expected)


@of_each_mask
def test_memory_that_is_used_anew(backend, rows):
    """The same addresses with other strides are other launches."""
    call = AttentionCall(SliceTable(rows), 0.1)
    fused = torch.randn(700, 8, 128, device="cuda").bfloat16()
    whole = fused.view(-1)[: 700 * 4 * 128].view(700, 4, 128)
    for q in (fused[:, :4], whole, fused[:, ::2]) * 2:
        same = q.clone(memory_format=torch.contiguous_format)
        x = inputs(700)._replace(k=same[:, :2].contiguous(), v=same[:, 2:].contiguous())
        assert_same(results_of(backend, x._replace(q=q), call), results_of(backend, x._replace(q=same), call))
