# SPDX-License-Identifier: Apache-2.0
"""The test harness itself: ranks that fail, die or hang never hang the caller."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from magi_attention.testing.distributed import RankError, RankPool, run_ranks


def total_of_ranks(rank: int, world_size: int, offset: int) -> tuple[int, int]:
    value = torch.tensor(rank + offset)
    dist.all_reduce(value)
    return int(value), os.getpid()


def misbehave(rank: int, world_size: int, how: str) -> None:
    if rank == 1:
        if how == "raise":
            raise KeyError("the reason")
        if how == "die":
            os._exit(7)
        time.sleep(60)
    dist.barrier()


def return_a_lambda(rank: int, world_size: int) -> object:
    return lambda: rank


@pytest.fixture(scope="module")
def pool():
    with RankPool(2) as pool:
        yield pool


def test_results_come_in_rank_order_from_processes_that_stay(pool):
    first = pool.run(total_of_ranks, 10)
    second = pool.run(total_of_ranks, 20)
    assert [total for total, _ in first] == [21, 21]
    assert [total for total, _ in second] == [41, 41]
    assert [pid for _, pid in first] == [pid for _, pid in second]
    assert len({pid for _, pid in first}) == 2


def test_failing_ranks_are_reported_and_the_pool_recovers(pool):
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2 failed.*in misbehave.*KeyError: 'the reason'") as caught:
        pool.run(misbehave, "raise")
    assert caught.value.rank == 1
    with pytest.raises(RankError, match="rank 1 of 2 failed:\nthe process died with exit code 7"):
        pool.run(misbehave, "die")
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] of 2 were not done after 0.5 s"):
        pool.run(misbehave, "hang", timeout_s=0.5)
    with pytest.raises(RankError, match="can't be pickled"):
        pool.run(return_a_lambda)
    assert pool.run(total_of_ranks, 0)[0][0] == 1


def test_run_ranks_spawns_and_ends_a_pool():
    assert [total for total, _ in run_ranks(1, total_of_ranks, 3)] == [3]


WAITING_RANKS = """
import sys, time
from pathlib import Path
from magi_attention.testing.distributed import run_ranks

def wait(rank, world_size, folder):
    Path(folder, str(rank)).touch()
    time.sleep(60)

if __name__ == "__main__":
    run_ranks(2, wait, sys.argv[1])
"""


@pytest.fixture
def caller_of_waiting_ranks(tmp_path):
    script, ready = tmp_path / "script.py", tmp_path / "ready"
    script.write_text(WAITING_RANKS)
    ready.mkdir()
    caller = subprocess.Popen(
        [sys.executable, script, ready], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while len(list(ready.iterdir())) < 2 and caller.poll() is None:
        time.sleep(0.05)
    yield caller
    with contextlib.suppress(ProcessLookupError):
        os.killpg(caller.pid, signal.SIGKILL)


def test_ranks_leave_an_interrupt_from_the_terminal_to_their_caller(caller_of_waiting_ranks):
    caller = caller_of_waiting_ranks
    os.killpg(caller.pid, signal.SIGINT)
    _, errors = caller.communicate(timeout=60)
    assert caller.returncode == -signal.SIGINT
    assert errors.count("Traceback") == 1


def test_ranks_end_with_a_caller_that_is_killed(caller_of_waiting_ranks):
    caller = caller_of_waiting_ranks
    caller.kill()
    caller.communicate(timeout=20)  # until nobody has its end of the pipe any more
    assert caller.returncode == -signal.SIGKILL
