# SPDX-License-Identifier: Apache-2.0
"""Ranks that disagree, or don't come, get an error that names them; nobody hangs."""

from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from magi_attention.comm import agreement, check_agreement
from magi_attention.config import RuntimeConfig
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


def stay_away(rank: int, world_size: int, absent: int, come_late: bool) -> list[str]:
    """One rank comes only when all others are through with a check, or never; then there is a check for all."""
    done = dist.PrefixStore(f"test/{absent}/{come_late}", _get_default_store())
    messages = []
    if rank != absent:
        messages.append(outcome(b"missed", dist.group.WORLD, timeout_s=0.5))
        done.set(str(rank), "")
    else:
        done.wait([str(other) for other in range(world_size) if other != absent])
    if rank != absent or come_late:
        messages.append(outcome(b"next", dist.group.WORLD, timeout_s=20.0 if come_late else 0.5))
    return messages


@pytest.mark.parametrize("absent", [0, 1])
def test_a_rank_that_missed_a_check_is_named_and_falls_in_step_again(pool, absent):
    for rank, messages in enumerate(pool.run(stay_away, absent, True, timeout_s=60)):
        assert messages.pop() == "agreed"
        if rank != absent:
            assert f"ranks [{absent}] of the group {list(range(pool.world_size))} did not come" in messages.pop()
    assert all(before == "agreed" for before, *_ in pool.run(agree_and_differ))


def test_a_rank_that_never_comes_keeps_nobody_waiting(pool):
    messages = pool.run(stay_away, 1, False, timeout_s=30)
    assert messages.pop(1) == []
    assert all("ranks [1] of the group" in message for of_rank in messages for message in of_rank)
    # Nor is the group lost: rank 1 missed two checks, and comes to the third.
    assert all(before == "agreed" for before, *_ in pool.run(agree_and_differ))


def make_the_others_wait(rank: int, world_size: int, late: int) -> tuple[str, list[str]]:
    """What the check says, and what is logged meanwhile; one rank comes once the others are waiting for it."""
    done = dist.PrefixStore(f"test/late/{late}", _get_default_store())
    with mock.patch.object(agreement, "_SILENCE_S", 0.1), mock.patch.object(agreement.logger, "warning") as warning:
        if rank == late:
            done.wait(["told"])
        else:
            warning.side_effect = lambda *message: done.set("told", "")
        said = outcome(b"same", dist.group.WORLD)
    return said, [call.args[0] % call.args[1:] for call in warning.call_args_list]


@pytest.mark.parametrize("late", [0, 1])
def test_a_rank_that_is_late_is_told_of_and_waited_for(pool, late):
    messages = []
    for said, logged in pool.run(make_the_others_wait, late, timeout_s=60):
        assert said == "agreed"
        messages += logged
    assert len(messages) == 1
    assert messages[0].startswith(f"waiting for ranks [{late}] of the group {list(range(pool.world_size))} to make")


def test_by_default_a_rank_may_take_the_time_to_save_a_checkpoint():
    assert RuntimeConfig().resolved().check_plan_timeout >= 600


def agree_in_threads(rank: int, world_size: int) -> list[str]:
    """Two groups over the same ranks, checked by two threads at once, each in its own order."""
    groups = [dist.new_group(range(world_size)) for _ in range(2)]
    with ThreadPoolExecutor(2) as threads:
        checks = [
            threads.submit(lambda g=group: [outcome(b"%d" % n, g) for n in range(5)])
            for group in groups[:: 1 - 2 * (rank % 2)]
        ]
        return [message for check in checks for message in check.result()]


def test_groups_over_the_same_ranks_are_checked_apart_by_threads(pool):
    assert pool.run(agree_in_threads, timeout_s=60) == [["agreed"] * 10] * pool.world_size


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


def initialize_again(rank: int, world_size: int, folder: str) -> list[str]:
    """Fewer ranks go on, then all again: what the groups did before must not count, though their names are the same."""
    messages = []
    for number, size in enumerate((world_size, world_size - 1, world_size)):
        dist.destroy_process_group()
        dist.init_process_group("gloo", init_method=f"file://{folder}/{number}", rank=rank, world_size=world_size)
        group = dist.new_group(list(range(size)))
        if rank < size:
            messages += [outcome(b"one", group), outcome(b"other" if rank else b"two", group), outcome(b"next", group)]
        dist.barrier()
        if number == 0:
            agreement._histories.clear()  # as if torch had used the store again, as it does under torchrun
            messages += [outcome(b"other" if rank else b"two", group), outcome(b"next", group)]
    return messages


def test_groups_after_torch_was_initialized_anew(tmp_path):
    with RankPool(3) as pool:
        answers = pool.run(initialize_again, str(tmp_path), timeout_s=60)
    for messages in answers:
        assert ["differ from" in each for each in messages[:5]] == [False, True, False, True, False]
        assert [each == "agreed" for each in messages[5:]] == [True, False, True] * ((len(messages) - 5) // 3)
    assert [len(messages) for messages in answers] == [11, 11, 8]


def lose_the_store(rank: int, world_size: int) -> list[str]:
    """Two checks, each in a thread of its own, when the process with the store has gone."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    left = dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)
    del server
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "_get_default_store", lambda: left)
        with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
            checks = [each.submit(outcome, b"any", dist.group.WORLD) for each in (first, second)]
            return [check.result(20) for check in checks]


def test_a_lost_store_is_named_by_every_check(pool):
    pool.run(agree_and_differ)  # the group has a history
    ranks = [*range(pool.world_size)]
    lost = f"the process that keeps the store of the process group is gone: did a rank of {ranks} fail?"
    assert pool.run(lose_the_store, timeout_s=60) == [[lost] * 2] * pool.world_size
