# SPDX-License-Identifier: Apache-2.0
"""Scales that are not positive, which the projects' kernels don't compute with; stand-ins for these, on the CPU."""

import math
from contextlib import nullcontext

import pytest
import torch

from magi_attention.common.slices import SliceTable
from magi_attention.kernels.protocol import AttentionCall, Support
from magi_attention.kernels.registry import installed_backends
from magi_kernels_blackwell.backend import WheelBackend
from magi_kernels_blackwell.prepared import ignore

REFERENCE = installed_backends()["reference"]


class StandIn(WheelBackend):
    name, wheels, measured_as, variants = "stand-in", {}, "fa4", ()

    def supports_on(self, arch, request):
        return Support(True)

    def compile_case(self, case):
        return False

    def launch_forward(self, q, k, v, call, into=None):
        assert call.softmax_scale > 0
        out, lse, max_logits = REFERENCE.forward(q, k, v, call)
        return out, lse.T, max_logits

    def launch_backward(self, dout, q, k, v, out, lse, dlse, call, into=None, keys_done=ignore):
        assert call.softmax_scale > 0
        dq, dk, dv = REFERENCE.backward(dout, q, k, v, out, lse.T, None if dlse is None else dlse.T, call)
        keys_done(dk, dv)
        return (dq if into is None else into.copy_(dq)), dk, dv


@pytest.mark.parametrize("scale", [0.3, 0.0, -0.3])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_scales(monkeypatch, scale, softcap):
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    draw = torch.Generator().manual_seed(0)
    dout, q = (torch.randn(30, 4, 8, generator=draw) for _ in range(2))
    k, v = (torch.randn(40, 2, 8, generator=draw) for _ in range(2))
    dlse = torch.randn(30, 4, generator=draw)
    call = AttentionCall(SliceTable([[0, 20, 0, 40, 1], [20, 25, 3, 9, 0]]), scale, softcap, max_logits=True)
    kept = q.clone()
    expected = REFERENCE.forward(q, k, v, call)
    result = StandIn().forward(q, k, v, call)
    for ours, wanted in zip(result, expected, strict=True):
        torch.testing.assert_close(ours, wanted)
    dlse = dlse.masked_fill(expected.lse == -math.inf, 0)
    saved = (dout, q, k, v, expected.out, expected.lse, dlse, call)
    into = torch.full_like(q, torch.nan)
    told: list[torch.Tensor] = []
    gradients = StandIn().backward_keys_first(lambda *of_keys: told.extend(of_keys), into, *saved)
    assert all(a is b for a, b in zip(told, gradients[1:], strict=True))
    assert gradients[0] is into
    for ours, wanted in zip(gradients, REFERENCE.backward(*saved), strict=True):
        torch.testing.assert_close(ours, wanted)
    assert torch.equal(q, kept)
