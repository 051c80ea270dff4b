# SPDX-License-Identifier: Apache-2.0
"""Every mask family in 1 to 8 stages, for each head dim, grouping of heads and dtype, against the float64 oracle.

Most kernels compile for seconds where the cache on disk doesn't have them. ``magi precompile`` fills it, see
``docs/development.md``.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from magi_attention.common.slices import SliceTable
from magi_attention.kernels.merge import merge_partials
from magi_attention.kernels.protocol import AttentionCall, AttentionRequest
from magi_attention.testing.masks import MASK_FAMILIES
from magi_attention.testing.metric import assert_within_pytorch_error
from magi_attention.testing.stages import Inputs, random_inputs, run_dense
from magi_kernels_blackwell import CUDNN_FLEX_BACKEND, FLASH_ATTENTION_4_BACKEND

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]

TOTAL = 600
STAGES = range(1, 9)
NAMES = ("out", "lse", "dq", "dk", "dv")


def run_stages(
    backend, x: Inputs, slices: SliceTable, scale: float, num_stages: int, *, deterministic: bool = False
) -> list[Tensor]:
    """Attend to the keys in stages, as a rank does to what it receives; returns what ``NAMES`` lists."""
    ends = np.linspace(0, len(x.k), num_stages + 1).astype(int).tolist()
    stages = [
        (
            slice(start, stop),
            AttentionCall(slices.clip_columns(start, stop).shift(0, -start), scale, deterministic=deterministic),
        )
        for start, stop in pairwise(ends)
    ]
    out, lse = None, None
    for keys, call in stages:
        partial = backend.forward(x.q, x.k[keys], x.v[keys], call)
        out, lse = partial[:2] if out is None else merge_partials(out, lse, *partial[:2])
    gradients = [backend.backward(x.dout, x.q, x.k[keys], x.v[keys], out, lse, x.dlse, call) for keys, call in stages]
    dq = torch.stack([each[0].float() for each in gradients]).sum(0)
    return [out, lse, dq, *(torch.cat([each[i] for each in gradients]) for i in (1, 2))]


def of_each_kind(test):
    """Run a test for each backend, head dims, grouping of heads and dtype."""
    for name, values in (
        ("dtype", [torch.bfloat16, torch.float16]),
        ("heads", [(8, 2), (4, 4), (8, 1)]),
        ("dims", [(128, 128), (64, 64), (192, 128), (192, 192), (256, 256), (96, 96)]),
    ):
        test = pytest.mark.parametrize(name, values, ids=str)(test)
    backends = [FLASH_ATTENTION_4_BACKEND, CUDNN_FLEX_BACKEND]
    return pytest.mark.parametrize("backend", backends, ids=lambda each: each.name)(test)


def inputs_for(backend, dims, heads, dtype, **options: bool) -> Inputs:
    """Draw tensors; skips the test if the backend can't serve them."""
    x = random_inputs(TOTAL, TOTAL, heads=heads, dims=dims, dtype=dtype, device="cuda")
    for direction in ("forward", "backward"):
        request = AttentionRequest.of_tensors(x.q, x.k, x.v, **options).toward(direction)
        if not (support := backend.supports(request)):
            pytest.skip(f"{backend.name}: {support.reason}")
    return x


@of_each_kind
def test_families_in_stages(backend, dims, heads, dtype):
    x, scale = inputs_for(backend, dims, heads, dtype), dims[0] ** -0.5
    for family, make in MASK_FAMILIES.items():
        slices = make(TOTAL, np.random.default_rng(7))
        truth, plain = (run_dense(x, slices, scale, 0.0, oracle=oracle) for oracle in (True, False))
        del truth[2], plain[2]  # the largest scores
        for num_stages in STAGES:
            actual = run_stages(backend, x, slices, scale, num_stages)
            for name, ours, reference, pytorch in zip(NAMES, actual, truth, plain, strict=True):
                assert_within_pytorch_error(ours, reference, pytorch, 2.0, f"{family} in {num_stages} stages: {name}")


@of_each_kind
def test_same_bits_in_deterministic_mode(backend, dims, heads, dtype):
    x, scale = inputs_for(backend, dims, heads, dtype, deterministic=True), dims[0] ** -0.5
    for number, (family, make) in enumerate(MASK_FAMILIES.items()):
        slices = make(TOTAL, np.random.default_rng(7))
        truth, plain = (run_dense(x, slices, scale, 0.0, oracle=oracle) for oracle in (True, False))
        del truth[2], plain[2]  # the largest scores
        num_stages = STAGES[number % len(STAGES)]
        first, second = (run_stages(backend, x, slices, scale, num_stages, deterministic=True) for _ in range(2))
        for name, ours, again, reference, pytorch in zip(NAMES, first, second, truth, plain, strict=True):
            says = f"{family} in {num_stages} stages: {name}"
            assert torch.equal(ours, again), says
            assert_within_pytorch_error(ours, reference, pytorch, 2.0, says)
