# SPDX-License-Identifier: Apache-2.0
"""Contexts over emulated GPUs, where something fails: on one rank, on all of them, or in the caller's hands."""

import gc
import threading
import weakref
from functools import partial

import numpy as np
import pytest
import torch

from magi_comm_grpcoll import (
    CapacityError,
    ContextOptions,
    GroupContext,
    PeerTimeoutError,
    PlanMismatchError,
    SlotLentError,
)
from magi_comm_grpcoll.combine import Combination
from magi_comm_grpcoll.exchange import SlotExchange
from magi_comm_grpcoll.lane import Round
from magi_comm_grpcoll.watchdog import RELEASED, Watchdog, Watched
from tests.comm.emulation import run_ranks
from tests.comm.test_native import fragmented_table
from tests.distributed.exchanges import RandomNeeds, random_tensor

pytestmark = pytest.mark.usefixtures("emulated")


class Grudging:
    """An emulated allocator that gives no more than ``most`` bytes at a time, and knows what still lives."""

    def __init__(self, allocator, most: int) -> None:
        self._allocator, self.most, self.given = allocator, most, []

    def allocate(self, num_bytes: int):
        if num_bytes > self.most:
            raise CapacityError(f"{num_bytes} bytes are too many")
        memory = self._allocator.allocate(num_bytes)
        self.given.append(weakref.ref(memory))
        return memory

    def free_unused(self) -> None:
        gc.collect()

    @property
    def num_alive(self) -> int:
        gc.collect()
        return sum(each() is not None for each in self.given)


@pytest.mark.parametrize("transport", ["copy_engine", "push", "put"])
def test_slots_go_when_larger_ones_come_or_the_context_is_closed(transport, monkeypatch):
    make = GroupContext._make_allocator
    monkeypatch.setattr(GroupContext, "_make_allocator", lambda self, heap: Grudging(make(self, heap), 1 << 40))

    def run(rank, group):
        native = GroupContext(group, ContextOptions(transport=transport, timeout_s=30))
        tables = [fragmented_table(rank, 2, 4, rows) for rows in (2, 40)]
        for table in tables * 3:
            native.cast([torch.ones(table.num_source, 1 << 14)], table).wait_host()
        assert native._allocator.num_alive == 2  # with the flags
        native.close()
        assert native._allocator.num_alive == 1
        assert len(tables) == 2

    run_ranks(2, run)


def test_after_a_growth_that_fails_what_fitted_before_goes_on(monkeypatch):
    make = GroupContext._make_allocator
    monkeypatch.setattr(GroupContext, "_make_allocator", lambda self, heap: Grudging(make(self, heap), 8 << 20))

    def run(rank, group):
        native = GroupContext(group, ContextOptions(timeout_s=30))
        small, medium, large = (fragmented_table(rank, 2, *size) for size in ((4, 2), (16, 20), (40, 20)))

        def exchange(table):
            owners = torch.zeros(table.num_received)
            for owner, first, stop in table.recv.tolist():
                owners[first:stop] = owner
            (received,) = native.cast([torch.full((table.num_source, 1 << 10), float(rank))], table).wait_host()
            assert (received == owners[:, None]).all()
            total = torch.zeros(table.num_source, 1 << 10)
            native.reduce([received], table, [total]).wait_host()
            assert (total == 2 * rank).all()

        def does_not_fit(table):
            with pytest.raises(CapacityError, match="bytes are too many"):
                exchange(table)

        for most in (8 << 20, 8 << 20, 1 << 20):
            exchange(small)
            exchange(medium)
            native._allocator.most = most
            with pytest.raises(CapacityError, match="bytes are too many"):
                native.cast([torch.ones(large.num_source, 1 << 11)], large)
        does_not_fit(small)
        native._allocator.most = 4 << 20  # which is too little for the medium one that is prepared
        for _ in range(2):
            exchange(small)
            does_not_fit(medium)
        native._allocator.most = 8 << 20
        exchange(medium)
        exchange(small)

    run_ranks(2, run)


def test_a_gpu_that_fails_while_a_rank_is_late_keeps_the_error():
    def run(rank, group):
        native = GroupContext(group, ContextOptions(timeout_s=0.5))
        if rank:
            return
        table = fragmented_table(rank, 2, 4, 2)
        native._control.local.cpu = lambda: (_ for _ in ()).throw(RuntimeError("the GPU has failed\nat length"))
        native._watchdog.stop()
        native.give_up(0, 3)
        with pytest.raises(PeerTimeoutError, match="some ranks of the group did not do their part of cast number 3"):
            native.cast([torch.ones(table.num_source, 4)], table)
        with pytest.raises(PeerTimeoutError):
            native.close()

    run_ranks(2, run)


def test_a_context_that_others_go_on_with_is_not_closed():
    needs = RandomNeeds(2, 2, 0.9, max_rows=9)

    def run(rank, group):
        native, table = GroupContext(group, ContextOptions(timeout_s=30)), needs.table(rank)
        rows = torch.ones(table.num_source, 4)
        call = native.close if rank == 0 else partial(native.cast, [rows], table)
        with pytest.raises(PlanMismatchError, match=r"ranks \[\d\] of the group don't do what this one does"):
            call()
        (received,) = native.cast([rows], table).wait_host()
        assert torch.equal(received, torch.ones(table.num_received, 4))
        native.close()

    run_ranks(2, run)


def test_lent_rows_must_come_back():
    needs = RandomNeeds(2, 2, 0.9, max_rows=9)

    def run(rank, group):
        native, table = GroupContext(group, ContextOptions(timeout_s=30)), needs.table(rank)
        rows = torch.ones(table.num_source, 4)
        held = [native.cast([rows], table, lend=True) for _ in range(2)]
        with pytest.raises(SlotLentError, match="release the oldest"):
            native.cast([rows], table)
        del held  # gives back
        gc.collect()
        for _ in range(3):
            native.cast([rows], table).wait_host()
        with pytest.raises(ValueError, match="rows on cpu"):
            native.cast([rows[1:]], table)
        with pytest.raises(ValueError, match=r"but one of them is \(\) on cpu"):
            native.cast([rows, rows.sum()], table)
        with pytest.raises(TypeError, match=r"no kernel combines torch\.float64"):
            native.reduce([torch.zeros(table.num_received, 4).double()], table, [rows])
        out, lse = torch.zeros(table.num_source, 2, 4), torch.zeros(table.num_source, 2)
        partial, partial_lse = torch.zeros(table.num_received, 2, 4), torch.zeros(table.num_received, 2)
        with pytest.raises(TypeError, match=r"torch\.float32 onto torch\.bfloat16: use .* float32 log"):
            native.reduce([partial], table, [out], "lse", partial_lse, lse.bfloat16())
        with pytest.raises(ValueError, match=r"op 'lse' takes tensors"):
            native.reduce([partial], table, [out], "lse", partial_lse[:, :1].contiguous(), lse)
        native.close()
        with pytest.raises(RuntimeError, match="closed"):
            native.cast([rows], table)

    run_ranks(2, run)


@pytest.mark.parametrize("transport", ["copy_engine", "push", "put"])
def test_a_rank_that_stops_is_named_and_nobody_hangs(transport):
    def run(rank, group):
        native = GroupContext(group, ContextOptions(transport=transport, timeout_s=0.5))
        table = fragmented_table(rank, 3, 4, 2)
        rows = torch.ones(table.num_source, 4)
        native.cast([rows], table).wait_host()
        if rank == 1:
            return
        with pytest.raises(
            PeerTimeoutError, match=r"ranks \[1\] of the group did not do their part of cast number 1"
        ) as late:
            native.cast([rows], table).wait_host()
        assert late.value.ranks == (1,)
        with pytest.raises(PeerTimeoutError):
            native.reduce([rows.new_zeros(table.num_received, 4)], table, [rows])

    run_ranks(3, run)


def test_a_rank_that_gives_up_has_nothing_untrue_to_tell():
    """Its own waits are over; but what it copies to the others from its outboxes is no more than what it has done."""

    def run(rank, group):
        native = GroupContext(group, ContextOptions(transport="copy_engine", timeout_s=0.5))
        table = fragmented_table(rank, 3, 4, 2)
        rows = torch.ones(table.num_source, 4)
        native.cast([rows], table).wait_host()
        if rank == 1:
            return
        with pytest.raises(PeerTimeoutError):
            native.cast([rows], table).wait_host()
        words = native._control.local.numpy().view(np.int64)
        for of_ring in native._words:
            assert words[of_ring.arrived // 8][1] == RELEASED
            assert (words[of_ring.outboxes // 8] <= 2).all()

    run_ranks(3, run)


def test_only_what_could_start_and_stands_still_is_late():
    rings = [Watched(name, np.zeros(2, np.int64)) for name in ("cast", "reduce")]

    class Owner:
        def give_up(self, ring: int, epoch: int) -> None:
            raise AssertionError("not called from here")

    owner = Owner()
    watchdog = Watchdog(rings, weakref.ref(owner), timeout_s=10)
    watchdog.stop()
    assert watchdog.look(0) is watchdog.look(100) is None  # nothing is under way
    rings[1].progress[:] = 3, 2
    assert watchdog.look(200) is watchdog.look(209) is None
    rings[1].progress[:] = 5, 3  # it moved on
    assert watchdog.look(211) is watchdog.look(221) is None
    assert watchdog.look(222) == (1, 3)


@pytest.mark.parametrize("transport", ["copy_engine", "push", "put"])
def test_a_rank_that_could_not_send_may_try_again(transport):
    """As after it ran out of memory for a kernel, and has freed some; the others know nothing of it."""
    needs = RandomNeeds(3, 2, 0.8, max_rows=20)
    sources = [random_tensor(rank, (rows, 8), torch.float32) for rank, rows in enumerate(needs.num_rows)]

    def fail(*arguments):
        raise torch.OutOfMemoryError("out of memory")

    def run(rank, group):
        native, table = GroupContext(group, ContextOptions(transport=transport, timeout_s=30)), needs.table(rank)
        for turn in range(4):
            (received,) = native.cast([sources[rank]], table).wait_host()
            if rank == turn % 2:
                whole = native._lanes[0].rounds.copy().pop()._bound.route
                route = getattr(whole, "_routes", [whole])[-1]  # what comes before has been enqueued
                send, route.send = route.send, fail
                for _ in range(3):
                    with pytest.raises(torch.OutOfMemoryError):
                        native.cast([sources[rank] + 1], table)
                route.send = send
            (received,) = native.cast([sources[rank] + turn], table).wait_host()
            assert torch.equal(received, needs.received([source + turn for source in sources], rank))
        native.close()

    run_ranks(2, run)


def test_a_failure_while_rows_are_taken_loses_no_slot():
    needs = RandomNeeds(3, 2, 0.8, max_rows=20)
    sources = [random_tensor(rank, (rows, 8), torch.float32) for rank, rows in enumerate(needs.num_rows)]

    def fail(*arguments, **options):
        raise torch.OutOfMemoryError("out of memory")

    def run(rank, group):
        native, table = GroupContext(group, ContextOptions(timeout_s=30)), needs.table(rank)
        is_failing.wait()
        for _ in range(native.options.num_slots):
            with pytest.raises(torch.OutOfMemoryError):
                native.cast([sources[rank]], table)
            partial = torch.zeros(table.num_received, 8)
            with pytest.raises(torch.OutOfMemoryError):
                native.reduce([partial], table, [sources[rank].clone()])
        if is_failing.wait() == 0:
            failing.undo()
        is_failing.wait()
        (received,) = native.cast([sources[rank]], table).wait_host()
        assert torch.equal(received, needs.received(sources, rank))
        total = torch.zeros_like(sources[rank])
        native.reduce([received], table, [total]).wait_host()
        native.close()

    is_failing = threading.Barrier(2, timeout=30)
    with pytest.MonkeyPatch.context() as failing:
        failing.setattr(Round, "deliver", fail)
        failing.setattr(Combination, "enqueue", fail)
        run_ranks(2, run)


def all_of_each_other(num_rows: list[int]) -> RandomNeeds:
    """Two ranks need all rows of each other."""
    needs = RandomNeeds(0, 2)
    needs.num_rows = np.array(num_rows)
    needs.needs = [np.array([(1 - rank, row) for row in range(num_rows[1 - rank])]) for rank in range(2)]
    return needs


@pytest.mark.parametrize("fails", ["to send", "to take rows"])
@pytest.mark.parametrize("is_cast", [True, False], ids=["cast", "reduce"])
def test_what_a_rank_sends_after_it_failed_between_rounds_is_not_taken_for_the_rest(is_cast, fails):
    needs = all_of_each_other([1200, 1500])

    def fail(*arguments):
        raise torch.OutOfMemoryError("out of memory")

    def run(rank, group):
        native, table = GroupContext(group, ContextOptions(capacity_bytes=8 << 20, timeout_s=1)), needs.table(rank)
        rows = torch.full((table.num_source, 1024), float(rank))
        (received,) = native.cast([rows], table).wait_host()
        native.reduce([received], table, [rows.clone()]).wait_host()

        def exchange():
            work = native.cast([rows], table) if is_cast else native.reduce([received], table, [rows.clone()])
            work.wait_host()

        if rank == 1:
            with pytest.raises(PeerTimeoutError, match=r"ranks \[0\] of the group did not do their part"):
                exchange()
            return
        lane = native._lanes[0 if is_cast else 1]
        assert len(lane.rounds) > 1
        with pytest.MonkeyPatch.context() as failing:
            if fails == "to send":
                first = []
                send = SlotExchange.send
                failing.setattr(
                    lane.exchange, "send", lambda *of: fail() if first else first.append(send(lane.exchange, *of))
                )
            else:
                for each in lane.rounds:
                    failing.setattr(each, "deliver" if is_cast else "addresses", fail)
            with pytest.raises(torch.OutOfMemoryError):
                exchange()
        with pytest.raises(PeerTimeoutError, match="failed on this rank after its first ones"):
            exchange()

    run_ranks(2, run)


@pytest.mark.parametrize("is_cast", [True, False], ids=["cast", "reduce"])
def test_a_first_use_that_fails_behind_the_handshake_may_be_tried_again(is_cast, monkeypatch):
    needs, make, failures = all_of_each_other([5, 7]), Round.__init__, [torch.OutOfMemoryError("out of memory")]

    def make_or_fail(self, plan, formats, lane, is_reduce):
        make(self, plan, formats, lane, is_reduce)
        if failures and lane.rank == 0 and is_reduce != is_cast:
            raise failures.pop()

    monkeypatch.setattr(Round, "__init__", make_or_fail)

    def run(rank, group):
        native, table = GroupContext(group, ContextOptions(timeout_s=30)), needs.table(rank)
        rows = torch.full((table.num_source, 4), float(rank))
        partial, total = torch.full((table.num_received, 4), 2.0), rows.clone()

        def exchange():
            if is_cast:
                (received,) = native.cast([rows], table).wait_host()
                assert (received == 1 - rank).all()
            else:
                native.reduce([partial], table, [total]).wait_host()
                assert (total == rank + 2).all()

        if rank == 0:
            with pytest.raises(torch.OutOfMemoryError):
                exchange()
        exchange()
        native.close()

    run_ranks(2, run)
