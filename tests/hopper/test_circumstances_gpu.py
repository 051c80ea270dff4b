# SPDX-License-Identifier: Apache-2.0
"""The kernels where they are not alone: on new threads, beside others, and in memory that is used anew; and in much."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from magi_attention.api import calc_attn, dispatch, magi_attn_varlen_key, undispatch
from magi_attention.common.slices import SliceTable
from magi_attention.config import DistAttnConfig, RuntimeConfig
from magi_attention.kernels.protocol import AttentionCall, AttentionRequest, IndexCall
from magi_attention.testing.lists import random_lists
from magi_attention.testing.stages import Inputs, random_inputs
from magi_kernels_hopper import BACKEND, launching

pytestmark = pytest.mark.gpu

IRREGULAR_ROWS = [[0, 200, 0, 300, 0], [200, 600, 100, 500, 1], [620, 640, 300, 340, 3], [620, 640, 0, 40, 2]]


@pytest.fixture(autouse=True, scope="module")
def hopper_gpu():
    request = AttentionRequest(torch.device("cuda"), torch.bfloat16, 4, 2, 128, 128)
    for direction in ("forward", "backward"):
        if not (support := BACKEND.supports(request.toward(direction))):
            pytest.skip(support.reason)


def inputs(num_q, num_k=None, *, heads=(4, 2), dims=(128, 128), dtype=torch.bfloat16) -> Inputs:
    return random_inputs(num_q, num_q if num_k is None else num_k, heads=heads, dims=dims, dtype=dtype, device="cuda")


def gradients_of(x: Inputs, call: AttentionCall) -> tuple[Tensor, ...]:
    result = BACKEND.forward(x.q, x.k, x.v, call)
    return BACKEND.backward(x.dout, x.q, x.k, x.v, result.out, result.lse, None, call)


def passes() -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Each kind of launch, with the same bits in every run."""
    x, call = inputs(700), AttentionCall(SliceTable(IRREGULAR_ROWS), 0.1, deterministic=True)
    few, of_few = inputs(40, 9000, heads=(16, 2)), AttentionCall(SliceTable([[0, 40, 0, 9000, 1]]), 0.1)
    by_lists = IndexCall(random_lists(700, 2, 700, 128, device="cuda"), 0.1, deterministic=True)
    result, of_lists = BACKEND.forward(x.q, x.k, x.v, call), BACKEND.forward_indices(x.q, x.k, x.v, by_lists)
    return {
        "forward": lambda: BACKEND.forward(x.q, x.k, x.v, call)[:2],
        "forward in parts": lambda: BACKEND.forward(few.q, few.k, few.v, of_few)[:2],
        "backward": lambda: BACKEND.backward(x.dout, x.q, x.k, x.v, result.out, result.lse, None, call),
        "index forward": lambda: BACKEND.forward_indices(x.q, x.k, x.v, by_lists)[:2],
        "index backward": lambda: BACKEND.backward_indices(
            x.dout, x.q, x.k, x.v, of_lists.out, of_lists.lse, None, by_lists
        ),
    }


@pytest.mark.parametrize("kind", ["forward", "forward in parts", "backward", "index forward", "index backward"])
def test_the_first_thing_that_a_thread_does(kind):
    """As in the backward pass of a first step: no CUDA call has made the GPU's context that of the thread."""
    run = passes()[kind]
    expected = [x.clone() for x in run()]
    torch.cuda.synchronize()
    with ThreadPoolExecutor(1) as thread:
        results = thread.submit(run).result()
    torch.cuda.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))


def test_threads_that_launch_at_once_have_their_own_results():
    xs = [inputs(700)._replace(q=inputs(700).q * (number + 1)) for number in range(3)]
    call = AttentionCall(SliceTable(IRREGULAR_ROWS), 0.1, deterministic=True)
    expected = [[y.clone() for y in gradients_of(x, call)] for x in xs]
    torch.cuda.synchronize()
    wrong: list[object] = []

    def work(number: int, stream: torch.cuda.Stream | None) -> None:
        try:
            with torch.cuda.stream(stream):
                for _ in range(50):
                    got = gradients_of(xs[number], call)
                    if not all(torch.equal(a, b) for a, b in zip(got, expected[number], strict=True)):
                        wrong.append(number)
        except Exception as error:
            wrong.append(error)

    # Two of them share the default stream, and with it the counters of work.
    streams = [None, None, torch.cuda.Stream()]
    threads = [threading.Thread(target=work, args=(number, stream)) for number, stream in enumerate(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("rows", [IRREGULAR_ROWS, [[0, 700, 0, 700, 1]]], ids=["irregular", "causal"])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (256, 256)], ids=str)
def test_one_block_does_all(dims, rows):
    """More multiprocessors are left to others than there are: what waits for other blocks' work finds it done."""
    x, slices = inputs(700, dims=dims, heads=(8, 2)), SliceTable(rows)
    alone = AttentionCall(slices, 0.1, deterministic=True, sm_margin=10000)
    result, expected = BACKEND.forward(x.q, x.k, x.v, alone), BACKEND.forward(x.q, x.k, x.v, AttentionCall(slices, 0.1))
    torch.testing.assert_close(result[:2], expected[:2], rtol=2e-2, atol=2e-2)
    arguments = x.dout, x.q, x.k, x.v, expected.out, expected.lse, x.dlse
    of_many = BACKEND.backward(*arguments, AttentionCall(slices, 0.1))
    for call in (alone, AttentionCall(slices, 0.1, sm_margin=10000)):
        torch.testing.assert_close(BACKEND.backward(*arguments, call), of_many, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("rows", [IRREGULAR_ROWS, [[0, 3000, 0, 3000, 1]]], ids=["irregular", "causal"])
def test_beside_kernels_that_take_multiprocessors(rows):
    """Blocks start late and few at a time; all that they count is zero afterwards."""
    x = inputs(3000, heads=(8, 2))
    call = AttentionCall(SliceTable(rows), 0.1, deterministic=True)
    expected = gradients_of(x, call)
    other, a = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    for _ in range(20):
        with torch.cuda.stream(other):
            for _ in range(10):
                a @ a
        assert all(torch.equal(got, wanted) for got, wanted in zip(gradients_of(x, call), expected, strict=True))
    torch.cuda.synchronize()
    assert not launching.counters(x.q.device, torch.cuda.current_stream().cuda_stream).any()


def test_memory_that_is_used_anew():
    """Launches are found by addresses: other strides, dtypes and sizes there are other launches."""
    memory = torch.empty(300, 16, 128, dtype=torch.bfloat16, device="cuda")
    call, shorter = (
        AttentionCall(SliceTable([[0, length, 0, length, 1]]), 0.1, deterministic=True) for length in (300, 200)
    )
    for dtype in (torch.bfloat16, torch.float16) * 2:
        fused = memory.view(dtype).copy_(torch.randn(memory.shape, device="cuda"))
        whole = fused.view(-1)[: 300 * 8 * 128].view(300, 8, 128)
        for q in (fused[:, :8], whole, fused[:, ::2], whole[:200]):
            same = q.clone(memory_format=torch.contiguous_format)
            k, v, dout = same[:, :2].contiguous(), same[:, 2:4].contiguous(), same.flip(0)
            results = []
            for queries in (same, q):
                of_length = call if len(q) == 300 else shorter
                out, lse, _ = BACKEND.forward(queries, k, v, of_length)
                results.append((out, lse, *BACKEND.backward(dout, queries, k, v, out, lse, None, of_length)))
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("length", [1, 300, 4097])
def test_heads_one_after_another(length):
    """As models have them that keep heads before tokens: from head to head it is farther than from token to token."""
    call = AttentionCall(SliceTable([[0, length, 0, length, 1]]), 0.1, deterministic=True)
    x = inputs(length, heads=(8, 2))
    apart = Inputs(*(each.transpose(0, 1).contiguous().transpose(0, 1) for each in x))
    results = [BACKEND.forward(*each[:3], call) for each in (x, apart)]
    assert torch.equal(results[0].out, results[1].out)
    assert torch.equal(results[0].lse, results[1].lse)
    for a, b in zip(gradients_of(x, call), gradients_of(apart, call), strict=True):
        assert torch.equal(a, b)
    lists = IndexCall(random_lists(length, 2, length, 64, device="cuda"), 0.1, deterministic=True)
    results = [BACKEND.forward_indices(*each[:3], lists) for each in (x, apart)]
    assert torch.equal(results[0].out, results[1].out)
    out, lse, _ = results[0]
    first, second = (BACKEND.backward_indices(each.dout, *each[:3], out, lse, None, lists) for each in (x, apart))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_tables_that_are_dropped_while_launches_wait():
    """What is allocated next on the tables' stream must not lie where a launch on another stream still reads."""
    x = inputs(700)
    expected = gradients_of(x, AttentionCall(SliceTable(IRREGULAR_ROWS), 0.1, deterministic=True))
    stream = torch.cuda.Stream()
    for _ in range(10):
        call = AttentionCall(SliceTable(IRREGULAR_ROWS), 0.1, deterministic=True)
        gradients_of(x, call)  # makes the tables on the default stream
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            got = gradients_of(x, call)
        call.slices.forget_derived()
        del call
        garbage = [
            torch.full((size,), -1, dtype=torch.int32, device="cuda") for size in (64, 256, 1024) for _ in range(99)
        ]
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        del garbage


def test_a_compiler_that_captures_graphs():
    """What is launched follows the mask of each call, and tables outlive the graphs that are captured around it."""
    config = DistAttnConfig(runtime_config=RuntimeConfig(kernel_backend="hopper"))
    keys = [
        magi_attn_varlen_key([0, end, 700], [0, end, 700], 8, 2, 128, 0, None, causal=True, dist_attn_config=config)
        for end in (300, 500)
    ]

    def step(x: Tensor, key: object) -> Tensor:
        q, k, v = (dispatch(x, key) * 2).split([8, 2, 2], dim=1)
        return undispatch(calc_attn(q, k, v, key)[0], key) * 0.5  # exact, in whatever precision it is done

    compiled = torch.compile(step, mode="reduce-overhead")
    for _ in range(5):
        for key in keys:
            x = torch.randn(700, 12, 128, device="cuda").bfloat16().requires_grad_()
            same, results = x.detach().clone().requires_grad_(), []
            torch.compiler.cudagraph_mark_step_begin()
            for run, leaf in ((compiled, x), (step, same)):
                out = run(leaf, key)
                out.float().square().sum().backward()
                results.append((out.detach().clone(), leaf.grad.clone()))
            torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)


def test_a_million_tokens_of_64_heads():
    """Offsets of elements exceed 32 bits: every document has the results of the first, which are those of it alone."""
    num_documents, length, heads = 1024, 1024, (64, 8)
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 125 << 30:
        pytest.skip("needs 125 GiB of free memory")
    one = inputs(length, heads=heads)
    call = AttentionCall(SliceTable([[0, length, 0, length, 1]]), 0.1)
    alone = BACKEND.forward(one.q, one.k, one.v, call)
    gradients = BACKEND.backward(one.dout, one.q, one.k, one.v, alone.out, alone.lse, None, call)
    q, k, v, dout = (x.repeat(num_documents, 1, 1) for x in one[:4])
    starts = torch.arange(num_documents) * length
    ranges = torch.stack([starts, starts + length, starts, starts + length, torch.ones_like(starts)], 1)
    all_documents = AttentionCall(SliceTable(ranges.numpy()), 0.1)
    result = BACKEND.forward(q, k, v, all_documents)
    all_gradients = BACKEND.backward(dout, q, k, v, result.out, result.lse, None, all_documents)
    for got, wanted in zip((*result[:2], *all_gradients), (*alone[:2], *gradients), strict=True):
        for document in got.split(length):
            torch.testing.assert_close(document, wanted, rtol=2e-2, atol=2e-2)
