# SPDX-License-Identifier: Apache-2.0
"""Native collectives on GPUs where a training is set up otherwise, and whatever thread calls them or drops their works.

With fewer GPUs than ranks, all ranks share one.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from magi_comm_grpcoll import ContextOptions, GroupContext
from magi_comm_grpcoll.errors import NotNativeError
from tests.comm.ranks import Reference, device, make_pool
from tests.comm.test_native import compare_casts, compare_reduces, fragmented_table, run_epochs
from tests.distributed.exchanges import random_tensor

pytestmark = pytest.mark.gpu(1)


@pytest.fixture(
    scope="module",
    params=[
        {"CUDA_DEVICE_MAX_CONNECTIONS": "1"},  # as Megatron-LM asks for: all streams in one queue
        {"CUDA_DEVICE_MAX_CONNECTIONS": "32"},
        {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
        {"CUDA_LAUNCH_BLOCKING": "1"},
    ],
    ids=["one_queue", "many_queues", "expandable_segments", "blocking_launches"],
)
def pool(request):
    with pytest.MonkeyPatch.context() as environment:
        for name, value in request.param.items():
            environment.setenv(name, value)
        with make_pool(2) as ranks:
            ranks.run(touch_gpu)  # spawns them
            yield ranks


def touch_gpu(rank: int, world_size: int) -> None:
    torch.zeros(1, device=device())


def test_bits_under_settings(pool):
    for transport in ("copy_engine", "push"):
        pool.run(compare_casts, transport, 0, timeout_s=100)
    pool.run(compare_reduces, 0, timeout_s=100)


@pytest.mark.parametrize("transport", ["copy_engine", "push"])
def test_many_epochs_under_settings(pool, transport):
    pool.run(run_epochs, transport, 300, timeout_s=100)


def is_refused(rank: int, world_size: int) -> None:
    torch.zeros(1, device=device())
    with pytest.raises(NotNativeError, match="on rank 0 PyTorch's allocator cudaMallocAsync has no pools"):
        GroupContext(dist.group.WORLD)


def test_an_allocator_without_pools_is_refused(monkeypatch):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:cudaMallocAsync")
    with make_pool(2) as ranks:
        ranks.run(is_refused)


@pytest.fixture(scope="module")
def plain():
    with make_pool(2) as ranks:
        yield ranks


def on_a_new_thread(run: Callable[[], object]) -> None:
    with ThreadPoolExecutor(1) as thread:
        thread.submit(run).result()


def call_on_other_threads(rank: int, world_size: int, transport: str) -> None:
    """Each call, and what drops a work, is the first thing that its thread does on a GPU, if it is one at all."""
    native = GroupContext(dist.group.WORLD, ContextOptions(transport=transport, timeout_s=30))
    table = fragmented_table(rank, world_size, 11, 7)
    rows = random_tensor(rank, (table.num_source, 64), torch.bfloat16).to(device())
    (expected,) = Reference().cast([rows], table)
    total = rows.float()
    Reference().reduce([expected], table, [total])
    torch.cuda.synchronize()

    def exchange() -> None:
        torch.cuda.set_device(device_of_rank)  # threads begin with the first one
        (received,) = native.cast([rows], table).wait()
        assert torch.equal(received, expected)
        sums = rows.float()
        native.reduce([received], table, [sums]).wait()
        assert torch.equal(sums, total)

    device_of_rank = device()
    for _ in range(3):
        on_a_new_thread(exchange)
    for _ in range(2 * native.options.num_slots):
        works = [native.cast([rows], table, lend=True)]
        assert torch.equal(works[0].wait()[0], expected)
        on_a_new_thread(works.clear)  # as a collector of cycles may; slots that were lost would be missed
    unwaited = [native.cast([rows], table, lend=True)]
    on_a_new_thread(unwaited.clear)
    assert torch.equal(native.cast([rows], table).wait()[0], expected)
    native.close()


@pytest.mark.parametrize("transport", ["copy_engine", "push"])
def test_other_threads(plain, transport):
    plain.run(call_on_other_threads, transport, timeout_s=60)


def exchange_by_default_on_a_gpu(rank: int, world_size: int) -> None:
    table = fragmented_table(rank, world_size, 11, 7)
    rows = random_tensor(rank, (table.num_source, 64), torch.bfloat16).to(device())
    (expected,) = Reference().cast([rows], table)
    with device():
        native = GroupContext(dist.group.WORLD, ContextOptions(timeout_s=30))
        for lend in (True, False):
            work = native.cast([rows], table, lend=lend)
            assert torch.equal(work.wait()[0], expected)
            work.release()
        native.close()


def test_a_default_device_changes_nothing(plain):
    plain.run(exchange_by_default_on_a_gpu, timeout_s=60)


def drop_a_context(rank: int, world_size: int) -> None:
    """What its exchanges use lives until they are done, also where nobody waits for them; a new one begins anew."""
    table = fragmented_table(rank, world_size, 37, 64)
    rows = random_tensor(rank, (table.num_source, 1024), torch.bfloat16).to(device())
    (expected,) = Reference().cast([rows], table)
    for _ in range(5):
        native = GroupContext(dist.group.WORLD, ContextOptions(timeout_s=30))
        table = fragmented_table(rank, world_size, 37, 64)
        torch.cuda._sleep(20_000_000 * (rank + 1))
        works = [native.cast([rows], table) for _ in range(3)]
        results = [work.wait() for work in works]
        del native, works, table
        garbage = [torch.full_like(rows, torch.nan) for _ in range(8)]
        assert all(torch.equal(got, expected) for (got,) in results)
        del garbage


def test_a_context_that_goes_while_its_exchanges_are_under_way(plain):
    plain.run(drop_a_context, timeout_s=100)
