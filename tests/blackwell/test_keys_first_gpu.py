# SPDX-License-Identifier: Apache-2.0
"""A full mask's backward pass on Hopper, where somebody waits for the gradients of some keys."""

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from magi_attention.common.slices import SliceTable
from magi_attention.kernels.protocol import AttentionCall, AttentionRequest
from magi_attention.testing.stages import Inputs, assert_stage_is_right, random_inputs
from magi_kernels_blackwell import FLASH_ATTENTION_4_BACKEND as BACKEND
from magi_kernels_blackwell.fa4.parts import order_of_parts
from magi_kernels_blackwell.masks import packed_mask

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]

NUM_Q = 300


class Case(NamedTuple):
    num_k: int
    heads: tuple[int, int]
    awaited: tuple[tuple[int, int], ...]
    num_last: int
    dim: int = 128
    dtype: torch.dtype = torch.bfloat16


CASES = {
    "one head is the last": Case(16384, (64, 8), ((0, 8192),), 1),
    "two heads": Case(8192, (64, 8), ((4096, 8192),), 2),
    "two runs": Case(8192, (64, 8), ((0, 128), (4096, 8192)), 3),
    "all heads": Case(4096, (32, 8), ((0, 2048),), 8),
    "a head for all": Case(8192, (16, 1), ((0, 4096),), 1),
    "ragged": Case(8100, (40, 40), ((100, 4000), (8000, 8100)), 16),
    "64 dims": Case(8192, (32, 8), ((0, 4096),), 4, 64),
    "256 dims": Case(8192, (24, 24), ((0, 4096),), 16, 256),
    "float16": Case(8192, (64, 8), ((0, 4096),), 2, 128, torch.float16),
}
of_each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
TWO_HEADS = CASES["two heads"]


class Awaited:
    """The backend, where somebody waits for some keys, and copies their gradients on a stream of its own."""

    forward = staticmethod(BACKEND.forward)

    def __init__(self, awaited: tuple[tuple[int, int], ...]) -> None:
        self.awaited, self.beside = awaited, torch.cuda.Stream()
        self.copies: list[Tensor] = []

    def backward(self, *arguments) -> tuple[Tensor, ...]:
        *tensors, call = arguments
        return BACKEND.backward_keys_first(self.copy, None, *tensors, replace(call, first_keys=self.awaited))

    def copy(self, dk: Tensor, dv: Tensor, rows_there) -> None:
        rows_there(self.beside)
        with torch.cuda.stream(self.beside):
            self.copies = [run.clone() for run in self.runs(dk, dv)]

    def runs(self, *of_keys: Tensor) -> list[Tensor]:
        return [each[start:stop] for each in of_keys for start, stop in self.awaited]

    def assert_copied(self, *of_keys: Tensor) -> None:
        assert len(self.copies) == 2 * len(self.awaited)
        assert all(torch.equal(a, b) for a, b in zip(self.copies, self.runs(*of_keys), strict=True))


def inputs(case: Case) -> Inputs:
    return random_inputs(NUM_Q, case.num_k, heads=case.heads, dims=(case.dim,) * 2, dtype=case.dtype, device="cuda")


def full(x: Inputs) -> SliceTable:
    return SliceTable([[0, len(x.q), 0, len(x.k), 0]])


def attended(x: Inputs, dlse: Tensor | None, softcap: float = 0.0) -> tuple:
    """The arguments of a backward pass."""
    call = AttentionCall(full(x), x.q.shape[2] ** -0.5, softcap)
    out, lse, _ = BACKEND.forward(x.q, x.k, x.v, call)
    return x.dout, x.q, x.k, x.v, out, lse, dlse, call


@pytest.fixture(autouse=True)
def _only_on_hopper():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("no such kernel on this GPU")
    request = AttentionRequest.of_tensors(*inputs(TWO_HEADS)[:3])
    if not (support := BACKEND.supports(request.toward("backward"))):
        pytest.skip(support.reason)


@of_each_case
def test_all_parts_are_right(case):
    x, backend = inputs(case), Awaited(case.awaited)
    call = AttentionCall(full(x), 1.0, first_keys=case.awaited)
    order = order_of_parts(packed_mask(call.slices, NUM_Q, case.num_k), call, case.heads, case.num_k)
    assert {extent.heads for extent in order.others} == {(case.heads[1] - case.num_last, case.heads[1])}
    assert_stage_is_right(backend, x, full(x))
    assert backend.copies


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_without_a_gradient_of_lse(softcap):
    """As in a pass of parts of which none knows of the others, but for the order of sums."""
    x = inputs(TWO_HEADS)
    arguments = attended(x, None, softcap)
    expected = BACKEND.backward(*arguments)
    for got, wanted in zip(Awaited(TWO_HEADS.awaited).backward(*arguments), expected, strict=True):
        assert (got.float() - wanted.float()).norm() < 1e-2 * wanted.float().norm()


@of_each_case
def test_a_stream_may_read_awaited_gradients_before_the_others_are_there(case):
    """Again and again, in the order of launches; what it has read are the gradients."""
    x, backend = inputs(case), Awaited(case.awaited)
    arguments, seen = attended(x, x.dlse), []
    for _ in range(20):
        _, *of_keys = backend.backward(*arguments)
        seen.append((backend.copies, of_keys))
    torch.cuda.synchronize()
    for backend.copies, of_keys in seen:
        backend.assert_copied(*of_keys)


@of_each_case
def test_launches_can_be_captured(case):
    """Also what waits for the awaited gradients, on a stream that joins again."""
    x, backend = inputs(case), Awaited(case.awaited)
    arguments = attended(x, x.dlse)
    expected = backend.backward(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = backend.backward(*arguments)
        torch.cuda.current_stream().wait_stream(backend.beside)
    for _ in range(3):
        for each in got:
            each.zero_()
        graph.replay()
        torch.cuda.synchronize()
        for ours, wanted in zip(got, expected, strict=True):
            assert (ours.float() - wanted.float()).norm() < 1e-2 * wanted.float().norm()
        backend.assert_copied(*got[1:])
