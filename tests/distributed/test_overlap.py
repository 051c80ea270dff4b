# SPDX-License-Identifier: Apache-2.0
"""Communication on a CUDA stream of its own: nothing is read too early, nothing waits on the host, no memory leaks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from magi_attention.api import calc_attn
from magi_attention.comm import alltoall
from magi_attention.comm.streams import communication_stream
from magi_attention.common.enum import AttnRole
from magi_attention.common.slices import SliceTable
from magi_attention.config import DistAttnConfig, OverlapConfig, RuntimeConfig
from magi_attention.plan.exchange import ExchangeTable
from magi_attention.runtime.cache import find_manager
from magi_attention.testing.distributed import RankPool
from tests.distributed.attention_case import Answer, Case, assert_right, attend, device, key_of

DEGREES = [0, 1, 3]
DELAY_CYCLES = 20_000_000  # some 10 ms, far beyond what the tests' kernels and transfers take


@pytest.fixture(scope="module", params=[pytest.param("nccl", marks=pytest.mark.gpu(2))])
def pool(request):
    with RankPool(min(torch.cuda.device_count(), 4), request.param) as pool:
        yield pool


def case_of(degree: int, total: int = 1024, **options) -> Case:
    config = DistAttnConfig(
        overlap_config=OverlapConfig(degree=degree, min_chunk_size=64),
        runtime_config=RuntimeConfig(**options),
    )
    slices = SliceTable([[0, total // 2, 0, total // 2, 1], [total // 2, total, 0, total, 1]])
    return Case(
        total,
        slices,
        config=config,
        dtype=torch.bfloat16,
        head_dim=64,
        head_dim_v=64,
        max_logits=False,
    )


def delay_transfers(patch: pytest.MonkeyPatch, where: str) -> None:
    """Let the communication stream sleep before or after each transfer."""
    send = alltoall.AllToAllCollectives._send

    def delayed(self, *arguments, **options):
        if where == "before transfers":
            torch.cuda._sleep(DELAY_CYCLES)
        result = send(self, *arguments, **options)
        if where == "after transfers":
            torch.cuda._sleep(DELAY_CYCLES)
        return result

    patch.setattr(alltoall.AllToAllCollectives, "_send", delayed)


def delay_kernels(patch: pytest.MonkeyPatch) -> None:
    """Let the computing stream write late what it gives to a collective, and read late what it gets."""
    for name in ("cast", "reduce"):
        original = getattr(alltoall.AllToAllCollectives, name)

        def delayed(self, tensors, *arguments, _original=original, **options):
            late = [torch.full_like(x, float("nan")) for x in tensors]
            torch.cuda._sleep(DELAY_CYCLES)
            for target, source in zip(late, tensors, strict=True):
                target.copy_(source)
            work = _original(self, late, *arguments, **options)
            torch.cuda._sleep(DELAY_CYCLES)
            return work

        patch.setattr(alltoall.AllToAllCollectives, name, delayed)


def attend_delayed(rank: int, world_size: int, case: Case, where: str) -> Answer:
    """The case, with the communication stream or the computing stream far behind the other."""
    case = replace(case, cp=world_size)
    attend(case, dist.group.WORLD)  # kernels are compiled, tables are on the device
    with pytest.MonkeyPatch.context() as patch:
        if where == "before kernels":
            delay_kernels(patch)
        elif where != "nowhere":
            delay_transfers(patch, where)
        return attend(case, dist.group.WORLD)


@pytest.mark.parametrize("where", ["before transfers", "after transfers", "before kernels"])
@pytest.mark.parametrize("degree", DEGREES)
def test_late_streams_change_nothing(pool, degree, where):
    case = case_of(degree)
    punctual = pool.run(attend_delayed, case, "nowhere")[0]
    late = pool.run(attend_delayed, case, where)[0]
    assert_right(case, late)
    for name in ("out", "lse"):
        assert torch.equal(punctual.tensors()[name], late.tensors()[name]), name


def make_inputs(rank: int, case: Case, key: object) -> list[torch.Tensor]:
    rows = find_manager(key).num_local_rows(AttnRole.QUERY)
    generator = torch.Generator(device()).manual_seed(rank)
    heads = (case.num_heads_q, case.num_heads_kv, case.num_heads_kv, case.num_heads_q)
    return [
        torch.randn(rows, h, case.head_dim, generator=generator, device=device(), dtype=case.dtype).requires_grad_()
        for h in heads
    ]


def passes(tensors: list[torch.Tensor], key: object) -> tuple[torch.Tensor, ...]:
    q, k, v, dout = tensors
    out = calc_attn(q, k, v, key)[0]
    return (out, *torch.autograd.grad(out, (q, k, v), dout.detach()))


def steady_state(rank: int, world_size: int, case: Case) -> None:
    key = key_of(replace(case, cp=world_size), dist.group.WORLD)
    tensors = make_inputs(rank, case, key)
    expected = passes(tensors, key)
    passes(tensors, key)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = passes(tensors, key)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(actual[0], expected[0])


@pytest.mark.parametrize("degree", DEGREES)
def test_the_host_never_waits(pool, degree):
    pool.run(steady_state, case_of(degree))


def constant_memory(rank: int, world_size: int, case: Case) -> tuple[list[int], list[int]]:
    key = key_of(replace(case, cp=world_size), dist.group.WORLD)
    tensors = make_inputs(rank, case, key)
    allocated, reserved = [], []
    for _ in range(50):
        with torch.autograd.set_multithreading_enabled(False):  # autograd's threads drop the gradients when they like
            passes(tensors, key)
        allocated.append(torch.cuda.memory_allocated())  # without synchronizing: nothing waits to be freed later
        reserved.append(torch.cuda.memory_reserved())
    return allocated, reserved


@pytest.mark.parametrize("degree", DEGREES)
def test_memory_stays_the_same(pool, degree):
    for allocated, reserved in pool.run(constant_memory, case_of(degree, total=4096)):
        assert len(set(allocated[3:])) == 1, allocated
        assert len(set(reserved[5:])) == 1, reserved


def interleaved(rank: int, world_size: int, cases: list[Case]) -> None:
    """Several keys whose layers run one after another, forward and then backward, as in a model."""
    keys = [key_of(replace(case, cp=world_size), dist.group.WORLD) for case in cases]
    inputs = [make_inputs(rank, case, key) for case, key in zip(cases, keys, strict=True)]
    alone = []
    for tensors, key in zip(inputs, keys, strict=True):
        alone.append(passes(tensors, key))
        torch.cuda.synchronize()
    for _ in range(3):
        outs = [calc_attn(*tensors[:3], key)[0] for tensors, key in zip(inputs, keys, strict=True)]
        leaves = [x for tensors in inputs for x in tensors[:3]]
        gradients = torch.autograd.grad(outs, leaves, [tensors[3].detach() for tensors in inputs])
        for number, (out, expected) in enumerate(zip(outs, alone, strict=True)):
            assert torch.equal(out, expected[0])
            for actual, gradient in zip(gradients[3 * number : 3 * number + 3], expected[1:], strict=True):
                torch.testing.assert_close(actual, gradient, rtol=2e-2, atol=2e-2)


def test_several_keys_and_layers(pool):
    pool.run(interleaved, [case_of(degree, total=total) for degree in DEGREES for total in (1024, 2048)])


def abandoned_work(rank: int, world_size: int) -> None:
    """A cast that nobody waits for must not let others use its memory while it travels."""
    n = 4096
    ranges = np.array([(peer, n * peer, n * (peer + 1)) for peer in range(world_size)], np.int64)
    table = ExchangeTable(ranges, ranges, world_size, n * world_size, n * world_size)
    collectives = alltoall.AllToAllCollectives(dist.group.WORLD)
    source = torch.ones(table.num_source, 64, device=device())
    stream = communication_stream(dist.group.WORLD, source.device)
    assert stream is not None
    with torch.cuda.stream(stream):
        torch.cuda._sleep(DELAY_CYCLES)
    work = collectives.cast([source], table)
    del work
    taken = [torch.zeros(table.num_received, 64, device=device()) for _ in range(8)]
    torch.cuda.synchronize()
    assert not any(x.any() for x in taken)


def test_a_work_that_is_dropped_keeps_its_memory(pool):
    pool.run(abandoned_work)


def test_traveling_queries_between_late_streams(pool):
    case = replace(case_of(1, qo_comm=True), num_heads_kv=4)
    case = replace(case, slices=SliceTable([[0, 768, 0, 768, 1], [1000, 1024, 0, 1024, 0]]))
    late = pool.run(attend_delayed, case, "before transfers")[0]
    assert_right(case, late)
