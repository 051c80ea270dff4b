# SPDX-License-Identifier: Apache-2.0
"""Ranks that disagree, or don't come, get an error that names them; nobody hangs."""

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


def stay_away(rank: int, world_size: int, absent: int, come_late: bool) -> str | None:
    """One rank comes to the check only when all others are through with it, or never."""
    done = dist.PrefixStore(f"test/{absent}/{come_late}", _get_default_store())
    if rank != absent:
        message = outcome(b"same", dist.group.WORLD, timeout_s=0.5)
        done.set(str(rank), "")
        return message
    done.wait([str(other) for other in range(world_size) if other != absent])
    return outcome(b"same", dist.group.WORLD, timeout_s=0.5) if come_late else None


@pytest.mark.parametrize("absent", [0, 1])
def test_late_ranks_are_named_by_all_and_told_the_same(pool, absent):
    for message in pool.run(stay_away, absent, True, timeout_s=30):
        assert f"ranks [{absent}] of the group {list(range(pool.world_size))} did not come" in message
    assert all(before == "agreed" for before, *_ in pool.run(agree_and_differ))


def test_a_rank_that_never_comes_keeps_nobody_waiting(pool):
    messages = pool.run(stay_away, 1, False, timeout_s=30)
    assert messages.pop(1) is None
    assert all("ranks [1] of the group" in message for message in messages)
    pool.close()  # the absent rank's count of checks is behind: the next test gets ranks of its own


def check_pairs(rank: int, world_size: int) -> list[str]:
    """Every rank but 0 with rank 0, each pair in a group of its own, which others never join."""
    others = range(1, world_size)
    pairs = {other: dist.new_group([0, other]) for other in others}
    return [outcome(b"a" * max(rank, 1), pairs[other]) for other in others if rank in (0, other)]


def test_groups_are_checked_apart(pool):
    of_leader, *of_others = pool.run(check_pairs)
    for other, message in enumerate(of_leader, start=1):
        assert of_others[other - 1] == [message]
        assert (message == "agreed") == (other == 1)
        assert other == 1 or f"ranks [{other}]" in message


def keys_after_checks(rank: int, world_size: int, num_checks: int) -> int:
    for number in range(num_checks):
        assert outcome(b"%d" % number, dist.group.WORLD) == "agreed"
    dist.barrier()
    return _get_default_store().num_keys()


def test_the_store_does_not_grow(pool):
    before = pool.run(keys_after_checks, 3)[0]
    assert pool.run(keys_after_checks, 20)[0] <= before + 2  # the barrier may keep a key or two of its own


def test_a_process_alone_agrees_with_itself():
    assert check_agreement(b"any", None) is None
