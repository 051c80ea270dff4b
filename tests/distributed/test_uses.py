# SPDX-License-Identifier: Apache-2.0
"""What stands around an attention changes nothing: checkpoints, threads, several passes, some gradients, DDP, FSDP."""

import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from torch.distributed import _functional_collectives as functional
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from magi_attention.api import (
    AttnMaskType,
    AttnRanges,
    DistAttnConfig,
    calc_attn,
    clear_cache,
    dispatch,
    flex_flash_attn_func,
    magi_attn_flex_key,
    magi_attn_varlen_key,
    roll,
    undispatch,
)
from magi_attention.comm.alltoall import AllToAllCollectives
from magi_attention.common.slices import SliceTable
from magi_attention.config import OverlapConfig, RuntimeConfig
from magi_attention.kernels.reference import BACKEND as REFERENCE
from magi_attention.runtime import autograd
from magi_attention.runtime import dispatch as exchange
from magi_attention.runtime import roll as rolling
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


class Layer(torch.nn.Module):
    """Attention over packed documents with a residual connection."""

    def __init__(self, with_sink=False):
        super().__init__()
        self.sink = torch.nn.Parameter(torch.zeros(2, HEADS)) if with_sink else None
        self.qkv = torch.nn.Linear(16, (HEADS + 2 * KV_HEADS) * DIM)
        self.out = torch.nn.Linear(HEADS * DIM, 16)

    def forward(self, x, key):
        q, k, v = self.qkv(x).unflatten(1, (-1, DIM)).split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        return x + self.out(calc_attn(q, k, v, key, sink=self.sink)[0].flatten(1))


class Model(torch.nn.Module):
    """Two layers, whose gradients come in several buckets."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList([Layer(), Layer()])

    def forward(self, x, key):
        for layer in self.layers:
            x = layer(x, key)
        return x


def train_replicas(rank, world_size):
    """Two steps of two micro-batches with masks of their own, the first without communication of gradients."""
    model = Model().double()
    replica = DistributedDataParallel(model, bucket_cap_mb=0.001)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(2):
        for micro_batch in range(2):
            cu_seqlens = [0, 20 + 7 * step + 3 * micro_batch, TOTAL]
            key = magi_attn_varlen_key(cu_seqlens, cu_seqlens, HEADS, KV_HEADS, DIM, 0, None, causal=True)
            x = torch.randn(TOTAL, 16, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            with replica.no_sync() if micro_batch == 0 else nullcontext():
                loss = replica(dispatch(x, key), key).square().sum()
                (world_size * loss).backward()  # it averages gradients, which are terms of a sum
            loss = loss.detach()
            torch.distributed.all_reduce(loss)
            losses.append(float(loss))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def test_replicas_by_ddp_train_as_one_process_does(pool):
    with RankPool(1) as alone:
        (expected,) = alone.run(train_replicas)
    for losses in pool.run(train_replicas):
        assert losses == pytest.approx(expected, rel=1e-12)


def differentiate_by_a_sink(rank, world_size, wrapped, reduce):
    """The sink's gradient, and what was warned of."""
    torch.manual_seed(0)
    layer = Layer(with_sink=True).double()
    replica = DistributedDataParallel(layer) if wrapped else layer
    config = DistAttnConfig(runtime_config=RuntimeConfig(sink_grad_reduce=reduce))
    key = magi_attn_varlen_key(
        [0, 50, TOTAL], [0, 50, TOTAL], HEADS, KV_HEADS, DIM, 0, None, causal=True, dist_attn_config=config
    )
    x = torch.randn(TOTAL, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loss = replica(dispatch(x, key), key).square().sum()
    with mock.patch.object(autograd, "_warned_about_sink", False), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (world_size * loss if wrapped else loss).backward()  # DDP averages gradients, which are terms of a sum
    return layer.sink.grad, [str(each.message) for each in caught if "sink" in str(each.message)]


@pytest.mark.parametrize(
    ("wrapped", "reduce", "factor"), [(True, "none", 1.0), (False, "sum", 1.0), (False, "avg", 0.5)]
)
def test_a_sink_is_reduced_by_whoever_reduces_all_parameters_or_as_asked_for(pool, wrapped, reduce, factor):
    with RankPool(1) as alone:
        ((expected, _),) = alone.run(differentiate_by_a_sink, False, reduce)
    for gradient, warned in pool.run(differentiate_by_a_sink, wrapped, reduce):
        torch.testing.assert_close(gradient, factor * expected, rtol=1e-10, atol=1e-10)
        assert len(warned) == (reduce == "none")
        assert all("DDP or FSDP" in each for each in warned)


def train_shards(rank, world_size):
    """One step whose layers FSDP hands their arguments in another precision, and the keys that layers were given."""
    model = Model().double()
    given = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _, arguments, __: given.append(arguments[1]))
        fully_shard(layer, mp_policy=MixedPrecisionPolicy(param_dtype=torch.float32))
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.float32))
    key = magi_attn_varlen_key([0, 50, TOTAL], [0, 50, TOTAL], HEADS, KV_HEADS, DIM, 0, None, causal=True)
    x = torch.randn(TOTAL, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loss = model(dispatch(x, key), key).square().sum()
    (world_size * loss).backward()  # it averages gradients, which are terms of a sum
    loss = loss.detach()
    torch.distributed.all_reduce(loss)
    norm = sum(each.grad.square().sum() for each in model.parameters()).full_tensor().sqrt()
    return [float(loss), float(norm)], [each is key for each in given]


def test_shards_in_mixed_precision_train_as_one_process_does(pool):
    with RankPool(1) as alone:
        ((expected, _),) = alone.run(train_shards)
    for numbers, are_the_key in pool.run(train_shards):
        assert numbers == pytest.approx(expected, rel=1e-5)
        assert are_the_key == [True, True]


def coming(x):
    """``x`` as functional collectives return it: a tensor without memory, until somebody waits for it."""
    rank, world = torch.distributed.get_rank(), torch.distributed.group.WORLD
    # torch 2.13 renamed it.
    gather = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor
    return gather(x.detach(), 0, world)[rank * len(x) : (rank + 1) * len(x)]


class WithGradientThatComes(torch.autograd.Function):
    """The identity, with a gradient as layers of tensor parallelism return it."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return coming(gradient)


def negated(x):
    """``x`` as the imaginary part of a conjugated tensor is: PyTorch only notes that its memory holds the opposite."""
    return torch._neg_view(-x.detach())


class WithNegatedGradient(WithGradientThatComes):
    """The identity, with a gradient whose memory holds the opposite."""

    @staticmethod
    def backward(ctx, gradient):
        return negated(gradient)


ELSEWHERE = {"coming": (coming, WithGradientThatComes), "negated": (negated, WithNegatedGradient)}


def attend_to_what_is_elsewhere(rank, world_size, where):
    """Outputs and gradients of tensors with and without memory that holds them, and what tensors' memory was read."""
    key = magi_attn_varlen_key([0, TOTAL], [0, TOTAL], HEADS, KV_HEADS, DIM, 0, None, causal=True)
    ranges = torch.tensor([[0, key.local_rows[0]]])
    (*qkv, _), dout = inputs()
    qkv, dout = [dispatch(x.detach(), key) for x in qkv], dispatch(dout, key)
    types = set()

    def watched(function):
        def run(self, *args, **kwargs):
            tensors = [x for arg in args for x in (arg if isinstance(arg, list | tuple) else [arg])]
            types.update((type(x).__name__, x.is_neg()) for x in tensors if isinstance(x, torch.Tensor))
            return function(self, *args, **kwargs)

        return run

    def run(given, returned):
        local = [given(x).requires_grad_() for x in qkv]
        out = returned(calc_attn(*local, key)[0]) + returned(flex_flash_attn_func(*local, ranges, ranges)[0])
        out = out + returned(roll(local[0], 1, 0, key)) + returned(dispatch(undispatch(local[0], key), key))
        return [x.detach() for x in (out, *torch.autograd.grad(out, local, dout))]

    expected = run(lambda x: x.clone(), lambda x: x)
    with ExitStack() as patches:
        for kind, names in ((type(REFERENCE), ("forward", "backward")), (AllToAllCollectives, ("cast", "reduce"))):
            for name in names:
                patches.enter_context(mock.patch.object(kind, name, watched(getattr(kind, name))))
        clear_cache()  # whose plans hold the methods
        key = magi_attn_varlen_key([0, TOTAL], [0, TOTAL], HEADS, KV_HEADS, DIM, 0, None, causal=True)
        given, returned = ELSEWHERE[where]
        found = run(given, returned.apply)
    return found, expected, types


@pytest.mark.parametrize("where", ELSEWHERE)
def test_what_is_not_in_a_tensor_s_memory_is_put_there_before_that_is_read(pool, where):
    for found, expected, types in pool.run(attend_to_what_is_elsewhere, where):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert types == {("Tensor", False)}


class WithGradientThatNoCompilerSees(WithGradientThatComes):
    """The same, in the midst of a backward pass that is compiled."""

    @staticmethod
    @torch.compiler.disable
    def backward(ctx, gradient):
        return coming(gradient)


def exchanges_of(key):
    return [partial(dispatch, key=key), partial(undispatch, key=key), lambda x: roll(x, 1, 0, key)]


def compile_what_comes(rank, world_size):
    """Gradients of exchanges with and without waiting, in a compiled backward pass, and what is read there."""
    torch._dynamo.reset()
    key = magi_attn_varlen_key([0, TOTAL], [0, TOTAL], HEADS, KV_HEADS, DIM, 0, None, causal=True)
    rows = TOTAL, *key.local_rows[:1] * 2
    types, results = set(), []

    def watched(function):
        def run(x, *args):
            types.add(type(x).__name__)
            return function(x, *args)

        return run

    with ExitStack() as patches:
        for module, name in ((exchange, "gather_rows"), (exchange, "select_rows"), (rolling, "_rolled")):
            patches.enter_context(mock.patch.object(module, name, watched(getattr(module, name))))
        for number, function in zip(rows, exchanges_of(key), strict=True):
            x, y = (torch.arange(float(number)).requires_grad_() for _ in range(2))
            function(x).square().sum().backward()
            loss = WithGradientThatNoCompilerSees.apply(function(y)).square().sum()
            with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
                loss.backward()
            results.append((y.grad, x.grad))
    return results, types


def test_what_a_compiled_backward_pass_brings_is_waited_for(pool):
    for results, types in pool.run(compile_what_comes):
        for found, expected in results:
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert types == {"Tensor"}


def differentiate_what_comes_twice(rank, world_size):
    """For each exchange, the error of a second derivative by a gradient that comes."""
    key = magi_attn_varlen_key([0, TOTAL], [0, TOTAL], HEADS, KV_HEADS, DIM, 0, None, causal=True)
    errors = []
    for number, function in zip((TOTAL, *key.local_rows[:1] * 2), exchanges_of(key), strict=True):
        x = torch.arange(float(number)).requires_grad_()
        out = function(x)
        dout = coming(torch.ones_like(out)).requires_grad_()
        (gradient,) = torch.autograd.grad(out, x, dout, create_graph=True)
        try:
            gradient.sum().backward()
            errors.append("")
        except RuntimeError as error:
            errors.append(str(error))
    return errors


def test_exchanges_of_what_comes_have_no_second_derivative_either(pool):
    for errors in pool.run(differentiate_what_comes_twice):
        assert len(errors) == 3
        assert all("no second derivative" in error for error in errors), errors
