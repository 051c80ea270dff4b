# SPDX-License-Identifier: Apache-2.0
"""A full mask's backward pass on Hopper, where somebody waits for the gradients of some keys."""

import pytest
import torch

from magi_attention.common.slices import SliceTable
from magi_attention.kernels.protocol import AttentionCall, AttentionRequest
from magi_attention.testing.stages import Inputs, random_inputs
from magi_kernels_blackwell import FLASH_ATTENTION_4_BACKEND as BACKEND

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]

CASES = {
    "half": (4096, (32, 8), ((0, 2048),)),  # 8 of 8 heads are the last
    "last heads": (8192, (64, 8), ((0, 4096),)),
    "two runs": (8192, (64, 8), ((0, 128), (4096, 8192))),
    "ragged": (8100, (40, 40), ((100, 4000), (8000, 8100))),
}
of_each_case = pytest.mark.parametrize(("num_k", "heads", "awaited"), CASES.values(), ids=CASES)


@pytest.fixture(autouse=True)
def _only_on_hopper():
    request = AttentionRequest.of_tensors(*inputs(64, 64, (8, 2))[:3])
    if torch.cuda.get_device_capability()[0] != 9 or not (support := BACKEND.supports(request.toward("backward"))):
        pytest.skip("no such kernel on this GPU" if torch.cuda.get_device_capability()[0] != 9 else support.reason)


def inputs(num_q: int, num_k: int, heads: tuple[int, int]) -> Inputs:
    return random_inputs(num_q, num_k, heads=heads, dims=(128, 128), dtype=torch.bfloat16, device="cuda")


def attended(x: Inputs, awaited: tuple[tuple[int, int], ...] = ()) -> tuple:
    """The arguments of a backward pass."""
    slices = SliceTable([[0, len(x.q), 0, len(x.k), 0]])
    call = AttentionCall(slices, x.q.shape[2] ** -0.5, first_keys=awaited)
    out, lse, _ = BACKEND.forward(x.q, x.k, x.v, call)
    return x.dout, x.q, x.k, x.v, out, lse, x.dlse, call


@of_each_case
def test_a_stream_may_read_awaited_gradients_before_the_others_are_there(num_k, heads, awaited):
    """Again and again, in the order of launches; what it has read are the gradients."""
    x, beside = inputs(700, num_k, heads), torch.cuda.Stream()
    expected = BACKEND.backward(*attended(x))
    arguments = attended(x, awaited)
    read, gradients = [], []

    def read_beside(dk, dv, rows_there):
        rows_there(beside)
        with torch.cuda.stream(beside):
            read.append([each[start:stop].clone() for each in (dk, dv) for start, stop in awaited])

    for _ in range(20):
        gradients.append(BACKEND.backward_keys_first(read_beside, None, *arguments))
    torch.cuda.synchronize()
    for copies, got in zip(read, gradients, strict=True):
        torch.testing.assert_close([*got], [*expected], rtol=2e-2, atol=2e-2)
        runs = [each[start:stop] for each in got[1:] for start, stop in awaited]
        assert all(torch.equal(a, b) for a, b in zip(copies, runs, strict=True))


def test_awaited_gradients_are_there_before_the_others():
    x, beside = inputs(4096, 4096, (32, 8)), torch.cuda.Stream()
    arguments = attended(x, ((0, 2048),))
    there, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def note(dk, dv, rows_there):
        rows_there(beside)
        there.record(beside)

    for _ in range(2):
        BACKEND.backward_keys_first(note, None, *arguments)
        done.record()
        torch.cuda.synchronize()
    assert there.elapsed_time(done) > 0


@of_each_case
def test_launches_can_be_captured(num_k, heads, awaited):
    """Also what waits for the awaited gradients, on a stream that joins again."""
    x, beside = inputs(700, num_k, heads), torch.cuda.Stream()
    arguments = attended(x, awaited)
    copies = []

    def read_beside(dk, dv, rows_there):
        rows_there(beside)
        with torch.cuda.stream(beside):
            copies[:] = [each[start:stop].clone() for each in (dk, dv) for start, stop in awaited]

    expected = BACKEND.backward_keys_first(read_beside, None, *arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = BACKEND.backward_keys_first(read_beside, None, *arguments)
        torch.cuda.current_stream().wait_stream(beside)
    for _ in range(3):
        for each in got:
            each.zero_()
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close([*got], [*expected], rtol=2e-2, atol=2e-2)
        runs = [each[start:stop] for each in got[1:] for start, stop in awaited]
        assert all(torch.equal(a, b) for a, b in zip(copies, runs, strict=True))
