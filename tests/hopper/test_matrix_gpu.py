# SPDX-License-Identifier: Apache-2.0
"""Everything that the kernels can be asked for, in all combinations, each with every family of masks.

Head dims, groups of heads, dtypes, softcap, largest scores, one stage or several, gradients in any order or in a fixed
one: all against the dense float64 oracle. Run them in several processes.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from magi_attention.common.slices import SliceTable
from magi_attention.kernels.protocol import AttentionCall, AttentionRequest
from magi_attention.testing.masks import MASK_FAMILIES
from magi_attention.testing.metric import assert_within_pytorch_error
from magi_attention.testing.stages import Inputs, random_inputs, run_dense
from magi_kernels_hopper import BACKEND
from magi_kernels_hopper.variants import HEAD_DIMS

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]

NUM_Q, NUM_K = 290, 330
STAGES = {"one stage": (0, NUM_K), "three stages": (0, 100, 101, NUM_K)}


@pytest.fixture(autouse=True, scope="module")
def hopper_gpu():
    request = AttentionRequest(torch.device("cuda"), torch.bfloat16, 4, 2, 128, 128)
    if not (support := BACKEND.supports(request)):
        pytest.skip(support.reason)


def mask_of(family: str) -> SliceTable:
    """A mask of more keys than queries."""
    square = MASK_FAMILIES[family](NUM_K, np.random.default_rng(7))
    return square.clip_rows(NUM_K - NUM_Q, NUM_K).shift(NUM_Q - NUM_K, 0)


def run(x: Inputs, parts: list[SliceTable], scale: float, softcap: float, ordered: bool) -> list[Tensor]:
    """out, lse, max_logits and gradients: merged, or added up, over the parts."""
    calls = [AttentionCall(each, scale, softcap, ordered, max_logits=True) for each in parts]
    out, lse, max_logits = BACKEND.forward(*x[:3], calls[0])
    if len(calls) > 1:
        # By head, as the runtime keeps it.
        out, lse = out.float(), lse.T.contiguous().T
    for call in calls[1:]:
        max_logits = torch.maximum(max_logits, BACKEND.forward_onto(out, lse, *x[:3], call))
    result = [out.to(x.q.dtype), lse, max_logits]
    gradients = [BACKEND.backward(x.dout, *x[:3], result[0], lse, x.dlse, call) for call in calls]
    if ordered:
        again = BACKEND.backward(x.dout, *x[:3], result[0], lse, x.dlse, calls[0])
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], again, strict=True))
    return [*result, *(torch.stack(each).float().sum(0).to(x.q.dtype) for each in zip(*gradients, strict=True))]


@pytest.mark.parametrize("dims", HEAD_DIMS, ids=str)
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (7, 1), (8, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_everything(dims, heads, dtype, softcap):
    scale = 1.1 * dims[0] ** -0.5
    x = random_inputs(NUM_Q, NUM_K, heads=heads, dims=dims, dtype=dtype, device="cuda")
    for number, family in enumerate(MASK_FAMILIES):
        slices = mask_of(family)
        truth = run_dense(x, slices, scale, softcap, oracle=True)
        plain = run_dense(x, slices, scale, softcap, oracle=False)
        for stages, ends in STAGES.items():
            parts = [slices.clip_columns(*each) for each in pairwise(ends)]
            # Both orders with every kind of stages, in turns.
            ordered = (number + len(parts)) % 2 == 0
            names = ("out", "lse", "max_logits", "dq", "dk", "dv")
            mine = run(x, parts, scale, softcap, ordered)
            for name, ours, reference, pytorch in zip(names, mine, truth, plain, strict=True):
                name = f"{name} of {family} in {stages}"
                assert_within_pytorch_error(ours, reference, pytorch, name=name)
