# SPDX-License-Identifier: Apache-2.0
"""Calls of a process that compiles its kernels itself: the first one and all later ones compute.

A kernel that has just been compiled may be launched by other ways of a wheel than one that was found on disk. What such
a launch is prepared from must launch again in the next call, or later results are whatever lies in memory.
"""

from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context
from types import SimpleNamespace

import pytest
import torch

from magi_attention.common.slices import SliceTable
from magi_attention.kernels.protocol import AttentionCall
from magi_attention.testing.metric import assert_within_pytorch_error
from magi_attention.testing.stages import random_inputs, run_dense
from magi_kernels_blackwell import CUDNN_FLEX_BACKEND, FLASH_ATTENTION_4_BACKEND
from magi_kernels_blackwell.cudnn_flex import launch
from magi_kernels_blackwell.prepared import Launch, noted
from tests.blackwell.matrix import keep_in

IRREGULAR = [[0, 200, 0, 300, 0], [200, 600, 100, 500, 1], [620, 640, 300, 340, 3], [620, 640, 0, 40, 2]]
CAUSAL = [[0, 700, 0, 700, 1]]


class Compiled:
    """Stands for ``cudnn.flex_attention.dispatch``: the first call compiles and returns the kernel past the cache."""

    def __init__(self) -> None:
        self.launched = 0
        self.is_fake = False
        self._flex_attn_fwd = SimpleNamespace(compile_cache={})

    def is_fake_mode(self) -> bool:
        return self.is_fake

    def _prepare_flex_attn_fwd(self, *tensors: object, **options: object) -> SimpleNamespace:
        return SimpleNamespace(arch=90)

    def _compile_flex_attn_fwd(self, prepared: object, *tensors: object):
        cache = self._flex_attn_fwd.compile_cache
        if "kernel" not in cache:
            cache["kernel"] = kernel = self._kernel
            return kernel
        return cache["kernel"]

    def _kernel(self, *arguments: object) -> None:
        self.launched += 1

    def _launch_flex_attn_fwd(self, prepared: object, kernel, *tensors) -> None:
        if not self.is_fake:
            kernel(*tensors[:4], *tensors[4:5], tensors[9], *tensors[5:8], "plan", tensors[8], 132)


def test_each_forward_call_launches_one_kernel_also_after_the_one_that_compiled(monkeypatch):
    dispatch = Compiled()
    library = SimpleNamespace(dispatch=dispatch, aligned=lambda x, align_bytes: x)
    plan = SimpleNamespace(metadata=SimpleNamespace(pack_gqa=False), _packed_plan=None)
    monkeypatch.setattr(launch, "mask_plan", lambda *arguments, **options: plan)
    monkeypatch.setattr(launch, "quiet", lambda library: nullcontext())
    x = torch.zeros(8, 2, 16)
    for mask in range(2):
        call = AttentionCall(SliceTable([[0, 8, mask, 8, 0]]), 1.0)
        for number in range(3):
            launch.launch_forward(library, x, x, x, call)
            assert dispatch.launched == 3 * mask + number + 1
    dispatch.is_fake = True
    launch.launch_forward(library, x, x, x, AttentionCall(SliceTable([[0, 8, 0, 7, 0]]), 1.0))
    assert dispatch.launched == 6


def test_a_launch_that_was_not_noticed_is_an_error():
    assert noted([Launch(print, ())], is_tracing=False)
    assert not noted([], is_tracing=True)
    with pytest.raises(RuntimeError, match="was not noticed"):
        noted([], is_tracing=False)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [IRREGULAR, CAUSAL], ids=["irregular", "causal"])
@pytest.mark.parametrize("backend", [CUDNN_FLEX_BACKEND, FLASH_ATTENTION_4_BACKEND], ids=lambda each: each.name)
def test_first_and_later_calls_on_several_streams(backend, rows, tmp_path):
    """In a process of its own, with an empty cache."""
    with ProcessPoolExecutor(1, get_context("spawn"), keep_in, (tmp_path,)) as pool:
        pool.submit(partial(call_many_times, backend, rows)).result()


def call_many_times(backend, rows: list[list[int]]) -> None:
    x = random_inputs(700, 700, heads=(8, 2), dims=(128, 128), dtype=torch.bfloat16, device="cuda")
    slices, scale = SliceTable(rows), 0.1
    truth, plain = (run_dense(x, slices, scale, 0.0, oracle=oracle) for oracle in (True, False))
    del truth[2], plain[2]  # the largest scores
    call = AttentionCall(slices, scale)
    side = torch.cuda.Stream()
    for number, stream in enumerate((None, None, side, side, None)):
        torch.cuda.synchronize()
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            # What kernels don't write stays NaN: where they are told to write, and in memory that is given out again.
            out, dq = torch.full_like(x.q, torch.nan), torch.full_like(x.q, torch.nan)
            poison = [torch.full_like(each, torch.nan) for each in (x.q, x.q, x.k, x.v, x.dlse)] * 2
            del poison
            lse = torch.full_like(x.dlse, torch.nan)
            result = backend.forward_into(out, lse, x.q, x.k, x.v, call)
            gradients = backend.backward_into(dq, x.dout, x.q, x.k, x.v, result.out, result.lse, x.dlse, call)
            done = torch.cuda.current_stream().record_event()
        done.synchronize()
        actual = (result.out, result.lse, *gradients)
        for name, ours, reference, pytorch in zip(("out", "lse", "dq", "dk", "dv"), actual, truth, plain, strict=True):
            assert_within_pytorch_error(ours, reference, pytorch, 2.0, f"{name} of call {number}")
