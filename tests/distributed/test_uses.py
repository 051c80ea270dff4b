# SPDX-License-Identifier: Apache-2.0
"""What trainings do around an attention changes nothing: checkpoints, threads, several passes, some gradients only."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from magi_attention.api import (
    AttnMaskType,
    AttnRanges,
    DistAttnConfig,
    calc_attn,
    dispatch,
    magi_attn_flex_key,
    undispatch,
)
from magi_attention.common.slices import SliceTable
from magi_attention.config import OverlapConfig, RuntimeConfig
from magi_attention.testing.distributed import RankPool
from magi_attention.testing.oracle import dense_attention

TOTAL, HEADS, KV_HEADS, DIM = 90, 4, 2, 8
# An empty slice, one without queries, a band, and rows from 70 on that read nothing.
SLICES = [(0, 40, 0, 40, 1), (20, 30, 50, 50, 0), (40, 70, 10, 60, 3), (45, 45, 60, 80, 0), (40, 60, 70, 90, 2)]
LAYOUTS = {
    "contiguous": lambda x: x,
    "heads first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every second number": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    "cut out of a wider one": lambda x: torch.cat([x, x], dim=-1)[..., : x.shape[-1]],
}


@pytest.fixture(scope="module")
def pool():
    with RankPool(2) as pool:
        yield pool


def inputs(needs=(True, True, True, True)):
    """q, k, v and the sink, and the gradient of the outputs."""
    generator = torch.Generator().manual_seed(0)
    shapes = (TOTAL, HEADS, DIM), (TOTAL, KV_HEADS, DIM), (TOTAL, KV_HEADS, DIM), (2, HEADS), (TOTAL, HEADS, DIM)
    *tensors, dout = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [x.requires_grad_(needed) for x, needed in zip(tensors, needs, strict=True)], dout


def attention(degree, layout="contiguous"):
    """The attention of the whole sequence, as a function of global tensors."""
    ranges = [AttnRanges.from_ranges([each[start : start + 2] for each in SLICES]) for start in (0, 2)]
    types = [AttnMaskType.from_int_type(each[4]) for each in SLICES]
    config = DistAttnConfig(
        overlap_config=OverlapConfig(degree=degree, min_chunk_size=8),
        runtime_config=RuntimeConfig(sink_grad_reduce="sum"),
    )
    sizes = (TOTAL, TOTAL, HEADS, KV_HEADS, DIM)
    key = magi_attn_flex_key(*ranges, types, *sizes, 0, None, dist_attn_config=config)

    def attend(q, k, v, sink):
        local = (LAYOUTS[layout](dispatch(x, key)) for x in (q, k, v))
        return undispatch(calc_attn(*local, key, sink=sink)[0], key)

    return attend


def in_a_thread(attend, *tensors):
    with ThreadPoolExecutor(1) as other:
        return other.submit(attend, *tensors).result()


def under_autocast(attend, *tensors):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return attend(*tensors)


CALLS = {
    "plain": lambda attend, *tensors: attend(*tensors),
    "reentrant checkpoint": lambda attend, *tensors: checkpoint(attend, *tensors, use_reentrant=True),
    "checkpoint": lambda attend, *tensors: checkpoint(attend, *tensors, use_reentrant=False),
    "another thread": in_a_thread,
    "autocast": under_autocast,
}


def gradients(rank, world_size, call, degree, needs=(True,) * 4, layout="contiguous", passes=1, retain=False):
    """The output, and the gradients after some passes, or after two backward passes of one."""
    tensors, dout = inputs(needs)
    attend = attention(degree, layout)
    for _ in range(passes):
        out = CALLS[call](attend, *tensors)
        for keep in (True, False) if retain else (False,):
            out.backward(dout, retain_graph=keep)
    return out.detach(), [x.grad for x in tensors]


def assert_right(answers, needs=(True,) * 4, times=1):
    tensors, dout = inputs(needs)
    *qkv, sink = tensors
    expected, _, _ = dense_attention(*qkv, SliceTable(np.array(SLICES)), sink=sink)
    expected.backward(dout)
    for out, found in answers:
        torch.testing.assert_close(out, expected.detach(), rtol=1e-10, atol=1e-10)
        for gradient, x in zip(found, tensors, strict=True):
            assert (gradient is None) == (x.grad is None)
            if gradient is not None:
                torch.testing.assert_close(gradient, times * x.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("degree", [0, 2])
@pytest.mark.parametrize("call", CALLS)
def test_wherever_it_is_called(pool, call, degree):
    assert_right(pool.run(gradients, call, degree))


@pytest.mark.parametrize(("passes", "retain"), [(3, False), (1, True)], ids=["accumulated", "retained"])
def test_gradients_add_up(pool, passes, retain):
    answers = pool.run(gradients, "plain", 2, (True,) * 4, "contiguous", passes, retain)
    assert_right(answers, times=2 if retain else passes)


@pytest.mark.parametrize("needed", range(4), ids=["q", "k", "v", "sink"])
def test_one_input_alone_has_gradients(pool, needed):
    needs = tuple(each == needed for each in range(4))
    assert_right(pool.run(gradients, "plain", 2, needs), needs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_count(pool, layout):
    assert_right(pool.run(gradients, "plain", 1, (True,) * 4, layout))
