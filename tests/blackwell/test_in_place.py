# SPDX-License-Identifier: Apache-2.0
"""Kernels write runs of a caller's tensors, and nothing beside them; received rows lie beside each other's values."""

import pytest
import torch

from magi_attention.common.slices import SliceTable
from magi_attention.kernels.protocol import AttentionCall, AttentionRequest, FinishesKeysFirst, WritesInPlace
from magi_kernels_blackwell import CUDNN_FLEX_BACKEND, FLASH_ATTENTION_4_BACKEND

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]

MASKS = {
    "causal": [[0, 700, 0, 900, 1]],
    "varlen causal": [[0, 333, 0, 333, 1], [333, 700, 333, 900, 1]],
    "irregular": [[0, 200, 0, 300, 0], [200, 600, 100, 500, 1], [620, 640, 300, 340, 3]],
}
BEFORE, AFTER, MARK = 37, 51, 7.0


@pytest.mark.parametrize("mask", sorted(MASKS))
@pytest.mark.parametrize("backend", [CUDNN_FLEX_BACKEND, FLASH_ATTENTION_4_BACKEND], ids=lambda backend: backend.name)
def test_runs_of_larger_tensors(backend, mask):
    draw = torch.Generator("cuda").manual_seed(0)

    def rows(count: int, heads: int) -> torch.Tensor:
        return torch.randn(count, heads, 128, generator=draw, device="cuda", dtype=torch.bfloat16)

    q, dout = rows(700, 8), rows(700, 8)
    k, v = rows(900, 4).split(2, dim=1)  # as keys and values arrive: side by side
    for direction in ("forward", "backward"):
        if not (support := backend.supports(AttentionRequest.of_tensors(q, k, v).toward(direction))):
            pytest.skip(f"{backend.name}: {support.reason}")
    assert isinstance(backend, WritesInPlace)
    call = AttentionCall(SliceTable(MASKS[mask]), 128**-0.5)

    def target() -> tuple[torch.Tensor, torch.Tensor]:
        whole = torch.full((BEFORE + 700 + AFTER, 8, 128), MARK, device="cuda", dtype=torch.bfloat16)
        return whole, whole[BEFORE : BEFORE + 700]

    def check(whole: torch.Tensor, run: torch.Tensor, result: torch.Tensor, expected: torch.Tensor) -> None:
        run.copy_(result)  # what the caller does where a kernel can't write there
        torch.testing.assert_close(run, expected, rtol=2e-2, atol=2e-2)
        assert (whole[:BEFORE] == MARK).all()
        assert (whole[BEFORE + 700 :] == MARK).all()

    expected = backend.forward(q, k.contiguous(), v.contiguous(), call)
    whole, run = target()
    result = backend.forward_into(run, torch.empty_like(expected.lse), q, k, v, call)
    assert result.out.data_ptr() == run.data_ptr()
    check(whole, run, result.out, expected.out)
    torch.testing.assert_close(result.lse, expected.lse)
    tensors = (dout, q, k, v, expected.out, expected.lse, None, call)
    gradients = backend.backward(dout, q, k.contiguous(), v.contiguous(), *tensors[4:])
    whole, run = target()
    dq, dk, dv = backend.backward_into(run, *tensors)
    check(whole, run, dq, gradients[0])
    torch.testing.assert_close(dk, gradients[1], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(dv, gradients[2], rtol=2e-2, atol=2e-2)
    assert isinstance(backend, FinishesKeysFirst)
    told: list[torch.Tensor] = []
    dq, dk, dv = backend.backward_keys_first(lambda *of_keys: told.extend(x.clone() for x in of_keys), None, *tensors)
    torch.testing.assert_close(dq, gradients[0], rtol=2e-2, atol=2e-2)
    for early, late, expected_gradient in zip(told, (dk, dv), gradients[1:], strict=True):
        assert torch.equal(early, late)
        torch.testing.assert_close(late, expected_gradient, rtol=2e-2, atol=2e-2)
