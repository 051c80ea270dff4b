# SPDX-License-Identifier: Apache-2.0
"""A rank dies in the middle: the others get an error that names it, within the timeout."""

import os
import time
from multiprocessing import get_context

import pytest
import torch
import torch.distributed as dist

from magi_comm_grpcoll import ContextOptions, GroupContext, PeerTimeoutError
from tests.comm.ranks import NO_PUTS, backend_of
from tests.comm.test_native import fragmented_table

# Ranks that share a GPU with other tests take their time over the first casts. NVSHMEM takes a second or two to start,
# and not on all ranks the same.
TIMEOUTS_S = {"copy_engine": 5.0, "push": 5.0, "put": 8.0}


def work_until_lost(rank: int, world_size: int, port: int, transport: str, results) -> None:
    try:
        be_lost_or_notice(rank, world_size, port, transport, results)
    except Exception as error:
        for _ in range(2):  # as many answers as are expected
            results.put((rank, f"{type(error).__name__}: {error}", 0.0))
    results.close()
    results.join_thread()
    os._exit(0)


def be_lost_or_notice(rank: int, world_size: int, port: int, transport: str, results) -> None:
    torch.cuda.set_device(rank % torch.cuda.device_count())
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    native = GroupContext(dist.group.WORLD, ContextOptions(transport=transport, timeout_s=TIMEOUTS_S[transport]))
    table = fragmented_table(rank, world_size, 5, 4)
    rows = torch.ones(table.num_source, 64, device="cuda")
    for _ in range(3):
        native.cast([rows], table).wait()
    torch.cuda.synchronize()
    if rank == 1:
        os._exit(9)
    started = time.monotonic()
    try:
        for _ in range(4):
            native.cast([rows], table).wait_host()
        results.put((rank, "nothing", 0.0))
    except PeerTimeoutError as error:
        results.put((rank, f"{error} {error.ranks}", time.monotonic() - started))
    try:
        native.cast([rows], table)
    except PeerTimeoutError:
        torch.cuda.synchronize()  # no stream waits for ever
        results.put((rank, "refused", 0.0))


@pytest.mark.gpu(1)
@pytest.mark.parametrize(
    "transport",
    ["copy_engine", "push", pytest.param("put", marks=pytest.mark.skipif(bool(NO_PUTS), reason=NO_PUTS))],
)
def test_the_others_get_an_error_that_names_the_lost_rank(transport):
    world_size = -(-3 // torch.cuda.device_count()) * torch.cuda.device_count()  # equally many on each
    backend_of(world_size)  # the ranks may share GPUs
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    spawn = get_context("spawn")
    results = spawn.Queue()
    arguments = (world_size, store.port, transport, results)
    processes = [
        spawn.Process(target=work_until_lost, args=(rank, *arguments), daemon=True) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        answers = [results.get(timeout=40) for _ in range(2 * (world_size - 1))]
    finally:
        for process in processes:
            process.kill()
            process.join()
    late = {rank: (message, seconds) for rank, message, seconds in answers if message != "refused"}
    assert set(late) == {rank for rank in range(world_size) if rank != 1}
    for message, seconds in late.values():
        assert "ranks [1] of the group did not do their part of cast" in message
        assert message.endswith("(1,)")
        assert TIMEOUTS_S[transport] * 0.9 < seconds < TIMEOUTS_S[transport] + 5
    assert sum(message == "refused" for _, message, _ in answers) == world_size - 1
