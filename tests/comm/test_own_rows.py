# SPDX-License-Identifier: Apache-2.0
"""Rows that a rank has itself, among those that native casts bring and reduces take home; on an emulated driver."""

import time
from functools import partial

import numpy as np
import pytest
import torch

from magi_attention.comm.packing import put_all_rows, take_all_rows
from magi_attention.comm.routes import Places, places_of
from magi_attention.plan.exchange import ExchangeTable
from magi_comm_grpcoll import ContextOptions, GroupContext, context, kernels, lane
from tests.comm.emulated_kernels import Launch
from tests.comm.emulated_streams import copy, current_stream, machine
from tests.comm.emulation import run_ranks

pytestmark = pytest.mark.usefixtures("emulated")


# Every second row of eight.
ODD = np.array([[1, 2], [3, 4], [5, 6], [7, 8]])


def places(*runs: tuple[int, int]) -> Places:
    return places_of(np.array(runs), torch.device("cpu"))


def wrong_places(*runs: tuple[int, int]) -> Places:
    """Places that are found out to be none as rows are copied to them, or from them."""
    return Places(np.array(runs), torch.tensor([1, 2, 3, 99]))


def test_own_rows_lie_among_received_ones():
    """Rank r receives the other's rows at the even places, and has its own at the odd ones, or at the first ones."""

    def run(rank, group):
        native = GroupContext(group, ContextOptions(timeout_s=30))
        for own, free in ((places(*ODD), [0, 2, 4, 6]), (places((0, 4)), [4, 5, 6, 7])):
            peer = 1 - rank
            recv = np.array([(peer, at, at + 1) for at in free])
            table = ExchangeTable(np.array([[peer, 0, 4]]), recv, 2, 4, 8)
            rows = torch.arange(4.0)[:, None].expand(4, 3) + 10 * rank
            expected = torch.empty(8, 3)
            expected[free], expected[own.rows] = rows + 10 * (peer - rank), rows
            for lend in (True, False):
                work = native.cast([rows], table, own_places=own, lend=lend)
                assert torch.equal(work.wait_host()[0], expected)
                work.release()
            out = torch.full((8, 3), -1.0)
            native.cast([rows], table, out=[out]).wait_host()
            expected[own.rows] = -1.0
            assert torch.equal(out, expected)
            with pytest.raises(ValueError, match="there are 3 own_places for rows of"):
                native.cast([rows], table, own_places=places((0, 3)))
            with pytest.raises(ValueError, match="reach from row 0 to row 8, but there are 8 rows"):
                native.cast([rows], table, own_places=places((0, 3), (8, 9)))

    run_ranks(2, run)


@pytest.mark.parametrize("transport", ["copy_engine", "push", "put"])
@pytest.mark.parametrize("lend", [True, False])
def test_few_multiprocessors_copy_long_runs(transport, lend, monkeypatch):
    """The second half of the rank's rows comes before the first, one tensor behind another."""
    monkeypatch.setattr(lane, "put_all_rows", None)

    def run(rank, group):
        native = GroupContext(group, ContextOptions(transport=transport, timeout_s=30))
        recv = np.array([(1 - rank, 0, 2), (1 - rank, 4, 6)])
        table, own = ExchangeTable(np.array([[1 - rank, 0, 4]]), recv, 2, 4, 9), places((6, 8), (2, 4))
        for turn in range(6):
            both = [
                [torch.arange(4.0)[:, None].expand(4, n) + 10 * r + 100 * turn for n in (4096, 8192)] for r in (0, 1)
            ]
            work = native.cast(both[rank], table, own_places=own, lend=lend)
            work.wait_packed()
            for received, mine, theirs in zip(work.wait_host(), both[rank], both[1 - rank], strict=True):
                assert torch.equal(received[:8], torch.cat([theirs[:2], mine[2:], theirs[2:], mine[:2]]))
            work.release()

    run_ranks(2, run)


@pytest.mark.parametrize(
    ("transport", "capacity_bytes", "kernels_before"),
    [("copy_engine", None, 1), ("copy_engine", 12 << 20, 1), ("push", None, 2), ("put", None, 3)],
)
def test_attention_begins_once_all_that_runs_beside_it_has(transport, capacity_bytes, kernels_before, monkeypatch):
    """Kernels take their time until they begin, the first ones the most."""
    options = ContextOptions(transport=transport, timeout_s=30, capacity_bytes=capacity_bytes)
    num_columns = 8192 if capacity_bytes is None else 1 << 18  # which take two rounds

    class LateLaunch(Launch):
        def enqueue(self):
            here = machine().of_thread
            order, here.num_launched = here.order, here.num_launched + 1

            def begin(pause_s=0.1 / here.num_launched):
                time.sleep(pause_s)
                order.append("kernel")

            self._stream.enqueue(begin)
            super().enqueue()

    monkeypatch.setattr(kernels, "Launch", LateLaunch)

    def run(rank, group):
        native, here = GroupContext(group, options), machine().of_thread
        table, own = ExchangeTable(np.array([[1 - rank, 0, 4]]), np.array([[1 - rank, 0, 4]]), 2, 4, 8), places((4, 8))
        for _ in range(2):  # at first the host waits for streams here, to which it brings tables
            here.order, here.num_launched = (order := []), 0
            work = native.cast([torch.full((4, num_columns), 1.0)], table, own_places=own, lend=True)
            assert work.packed is not None  # also where the host, in several rounds, waits for streams here
            work.wait_packed()
            current_stream().enqueue(partial(order.append, "attention"))
            current_stream().synchronize()
            work.release()
            assert order.index("attention") >= kernels_before

    run_ranks(2, run)


@pytest.mark.parametrize("misfit", ["short runs", "odd rows", "odd address", "buffers of the caller"])
def test_all_multiprocessors_copy_what_bulk_copies_cannot_or_would_slowly(misfit, monkeypatch):
    copied = []
    monkeypatch.setattr(lane, "put_all_rows", lambda *all_: copied.append(0) or put_all_rows(*all_))

    def run(rank, group):
        native = GroupContext(group, ContextOptions(timeout_s=30))
        table = ExchangeTable(np.array([[1 - rank, 0, 4]]), np.array([[1 - rank, 0, 4]]), 2, 4, 8)
        num_columns = {"short runs": 4, "odd rows": 8193}.get(misfit, 8192)
        memory = torch.arange(4.0 * num_columns + 1) + rank
        rows = memory[misfit == "odd address" :][: 4 * num_columns].view(4, num_columns)
        out = [torch.empty(8, num_columns)] if misfit == "buffers of the caller" else None
        (received,) = native.cast([rows], table, out, places((5, 8), (4, 5))).wait_host()
        assert torch.equal(received, torch.cat([rows + 1 - 2 * rank, rows[3:], rows[:3]]))

    run_ranks(2, run)
    assert len(copied) == 2


@pytest.mark.parametrize("lend", [True, False])
def test_own_rows_of_no_bytes_come_before_others(lend):
    """Such a tensor has no address, from which one could count to the tensors behind it."""

    def run(rank, group):
        native = GroupContext(group, ContextOptions(timeout_s=30))
        table = ExchangeTable(np.array([[1 - rank, 0, 4]]), np.array([[1 - rank, 0, 4]]), 2, 4, 8)
        rows = torch.arange(4.0)[:, None].expand(4, 8192) + rank
        none, received = native.cast([torch.empty(4, 0), rows], table, None, places((4, 8)), lend).wait_host()
        assert none.shape == (8, 0)
        assert torch.equal(received, torch.cat([rows + 1 - 2 * rank, rows]))

    run_ranks(2, run)


@pytest.mark.parametrize("transport", ["copy_engine", "push", "put"])
@pytest.mark.parametrize("capacity_bytes", [None, 12 << 20])
def test_own_rows_are_taken_before_what_comes_home_is_added(transport, capacity_bytes):
    """A rank's own gradients lie at the odd rows, or the last ones, among those that it sends home."""

    def run(rank, group):
        native = GroupContext(group, ContextOptions(transport=transport, timeout_s=30, capacity_bytes=capacity_bytes))
        num_columns = 3 if capacity_bytes is None else 1 << 18  # which take two rounds
        table = ExchangeTable(np.array([[1 - rank, 0, 4]]), np.array([[1 - rank, 0, 4]]), 2, 4, 8)
        for turn in range(4):
            partial = (torch.arange(8.0) + 10 * rank + 100 * turn)[:, None].expand(8, num_columns).contiguous()
            there = torch.arange(4.0) + 10 * (1 - rank) + 100 * turn
            for own in (places(*ODD), places((4, 8))):
                into = torch.full((4, num_columns), torch.nan)
                native.reduce([partial], table, [into], own_places=own).wait_host()
                assert torch.equal(into, partial[own.rows] + there[:, None])
        with pytest.raises(ValueError, match=r"3 own_places for rows of \[\(4, "):
            native.reduce([partial], table, [into], own_places=places((5, 8)))
        with pytest.raises(ValueError, match="'lse' takes no own_places"):
            native.reduce([partial], table, [into], "lse", partial, into, own_places=own)

    run_ranks(2, run)


@pytest.mark.parametrize("transport", ["copy_engine", "push", "put"])
def test_own_rows_that_cannot_be_copied_cost_no_slot(transport):
    def run(rank, group):
        native = GroupContext(group, ContextOptions(transport=transport, timeout_s=30))
        table = ExchangeTable(np.array([[1 - rank, 0, 4]]), np.array([[1 - rank, 0, 4]]), 2, 4, 8)
        rows, partial, nowhere = torch.full((4, 3), float(rank)), torch.zeros(8, 3), wrong_places((4, 8))
        for _ in range(5):
            with pytest.raises(IndexError, match="99"):
                native.cast([rows], table, own_places=nowhere)
            with pytest.raises(IndexError, match="99"):
                native.reduce([partial], table, [torch.zeros(4, 3)], own_places=nowhere)
        for turn in range(5):
            received = native.cast([rows + turn], table, own_places=places((4, 8))).wait_host()[0]
            assert torch.equal(received, torch.cat([torch.full_like(rows, 1 - rank), rows]) + turn)
            into = torch.zeros(4, 3)
            native.reduce([received], table, [into], own_places=places((4, 8))).wait_host()
            assert torch.equal(into, 2 * (rows + turn))

    run_ranks(2, run)


@pytest.mark.parametrize("transport", ["copy_engine", "push", "put"])
@pytest.mark.parametrize("is_cast", [True, False], ids=["cast", "reduce"])
def test_what_a_failed_call_sends_is_sent_before_its_rows_may_go(transport, is_cast):
    """Rank 0's calls fail once they have begun to send, and what its stream does next overwrites the rows."""

    def run(rank, group):
        native = GroupContext(group, ContextOptions(transport=transport, timeout_s=30))
        table = ExchangeTable(np.array([[1 - rank, 0, 4]]), np.array([[1 - rank, 0, 4]]), 2, 4, 4)
        nowhere = wrong_places((0, 4))
        for turn in range(10):
            rows, into = torch.full((4, 3), float(turn)), torch.zeros(4, 3)
            if rank == 0:
                start = (
                    partial(native.cast, [rows], table) if is_cast else partial(native.reduce, [rows], table, [into])
                )
                with pytest.raises(IndexError, match="99"):
                    start(own_places=nowhere)
                torch.cuda.current_stream().enqueue(partial(rows.fill_, -1.0))
            else:
                work = native.cast([rows], table) if is_cast else native.reduce([rows], table, [into])
                received = work.wait_host()
                assert ((received[0] if is_cast else into) == turn).all()

    run_ranks(2, run)


@pytest.mark.parametrize("transport", ["copy_engine", "put"])
def test_own_rows_wait_until_their_slot_is_given_back(transport):
    def run(rank, group):
        native = GroupContext(group, ContextOptions(transport=transport, timeout_s=30))
        table = ExchangeTable(np.array([[1 - rank, 0, 4]]), np.array([[1 - rank, 0, 4]]), 2, 4, 8)
        wrong, reader = [], torch.cuda.Stream()  # which the caller's stream knows nothing of

        def read(received: torch.Tensor, turn: int) -> None:
            time.sleep(3e-3)
            wrong.extend([turn] * bool((received[4:] != turn).any()))

        for turn in range(12):
            work = native.cast([torch.full((4, 3), float(turn))], table, own_places=places((4, 8)), lend=True)
            work.precede(reader)
            (received,) = work.wait()
            reader.enqueue(lambda received=received, turn=turn: read(received, turn))
            work._release_behind(reader)
        reader.synchronize()
        assert not wrong

    run_ranks(2, run)


@pytest.mark.parametrize("transport", ["copy_engine", "push", "put"])
def test_what_comes_home_is_added_to_own_rows_that_are_there(transport, monkeypatch):
    """They are taken by a kernel on the caller's stream, which may still be at work when all others' have come."""

    def take_later(targets, places, tensors):
        def take():
            time.sleep(0.05)
            take_all_rows(targets, places, tensors)

        current_stream().enqueue(take)

    monkeypatch.setattr(context, "take_all_rows", take_later)

    def run(rank, group):
        native = GroupContext(group, ContextOptions(transport=transport, timeout_s=30))
        table = ExchangeTable(np.array([[1 - rank, 0, 4]]), np.array([[1 - rank, 0, 4]]), 2, 4, 8)
        for own in (places(*ODD), places((4, 8))):
            partial, into = torch.arange(8.0)[:, None].expand(8, 3) + rank, torch.full((4, 3), torch.nan)
            native.reduce([partial], table, [into], own_places=own).wait_host()
            assert torch.equal(into, partial[own.rows] + torch.arange(4.0)[:, None] + 1 - rank)

    run_ranks(2, run)


@pytest.mark.parametrize("transport", ["copy_engine", "push", "put"])
@pytest.mark.parametrize("lend", [True, False])
def test_own_rows_are_copied_once_the_caller_has_made_them(transport, lend):
    def run(rank, group):
        native = GroupContext(group, ContextOptions(transport=transport, timeout_s=30))
        table = ExchangeTable(np.array([[1 - rank, 0, 4]]), np.array([[1 - rank, 0, 4]]), 2, 4, 8)
        for num_columns in (3, 8192):  # row by row, and in long runs
            rows, made = torch.zeros(4, num_columns), torch.full((4, num_columns), 1.0 + rank)
            current_stream().enqueue(lambda: time.sleep(0.05))
            current_stream().enqueue(partial(copy, rows.data_ptr(), made.data_ptr(), rows.nbytes))
            work = native.cast([rows], table, own_places=places((4, 8)), lend=lend)
            assert torch.equal(work.wait_host()[0], torch.cat([3 - made, made]))
            work.release()

    run_ranks(2, run)
