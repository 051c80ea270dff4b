# SPDX-License-Identifier: Apache-2.0
"""Ranks that disagree, or don't come, get an error that names them; nobody hangs."""

import time

import pytest
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from magi_attention.comm import check_agreement
from magi_attention.testing.distributed import RankPool


@pytest.fixture(scope="module", params=["gloo-3", pytest.param("nccl-2", marks=pytest.mark.gpu(2))])
def pool(request):
    backend, size = request.param.split("-")
    with RankPool(int(size), backend) as pool:
        yield pool


def outcome(digest: bytes, group: dist.ProcessGroup, timeout_s: float = 20.0) -> str:
    try:
        check_agreement(digest, group, timeout_s)
    except RuntimeError as error:
        return str(error)
    return "agreed"


def agree_and_differ(rank: int, world_size: int) -> list[str]:
    """Three checks in a row: a mismatch does not spoil the next."""
    last = world_size - 1
    digests = [b"same", b"other" if rank == last else b"same", b"new"]
    return [outcome(digest, dist.group.WORLD) for digest in digests]


def test_mismatch_is_an_error_on_every_rank(pool):
    last = pool.world_size - 1
    for before, differing, after in pool.run(agree_and_differ):
        assert before == after == "agreed"
        assert f"ranks [{last}] differ from ranks {list(range(last))}" in differing


def stay_away(rank: int, world_size: int, absent: int, come_later: bool) -> tuple[str, float]:
    started = time.monotonic()
    if rank == absent and not come_later:
        return "", 0.0
    if rank == absent:
        time.sleep(4.0)
    return outcome(b"same", dist.group.WORLD, timeout_s=0.5), time.monotonic() - started


@pytest.mark.parametrize("absent", [0, 1])
@pytest.mark.parametrize("come_later", [True, False])
def test_missing_ranks_are_named_by_all_who_wait(absent, come_later):
    # After a rank has stayed away for good its count of checks is behind: each case needs ranks of its own.
    with RankPool(2) as ranks:
        for rank, (message, seconds) in enumerate(ranks.run(stay_away, absent, come_later)):
            if rank != absent or come_later:
                assert f"ranks [{absent}] of the group [0, 1] did not come" in message
                assert seconds < 10
