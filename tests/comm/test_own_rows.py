# SPDX-License-Identifier: Apache-2.0
"""Rows that a rank has itself, among those that native casts bring and reduces take home; on an emulated driver."""

import time
from functools import partial

import numpy as np
import pytest
import torch

from magi_attention.plan.exchange import ExchangeTable
from magi_comm_grpcoll import ContextOptions, GroupContext
from tests.comm.emulation import emulate, run_ranks


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    with emulate(monkeypatch):
        yield


def test_own_rows_lie_among_received_ones():
    """Rank r receives the other's rows at the even places, and has its own at the odd ones, or at the first ones."""

    def run(rank, group):
        native = GroupContext(group, ContextOptions(timeout_s=30))
        for places in (torch.tensor([1, 3, 5, 7]), slice(0, 4)):
            free = [0, 2, 4, 6] if isinstance(places, torch.Tensor) else [4, 5, 6, 7]
            peer = 1 - rank
            recv = np.array([(peer, at, at + 1) for at in free])
            table = ExchangeTable(np.array([[peer, 0, 4]]), recv, 2, 4, 8)
            rows = torch.arange(4.0)[:, None].expand(4, 3) + 10 * rank
            expected = torch.empty(8, 3)
            expected[free], expected[places] = rows + 10 * (peer - rank), rows
            for lend in (True, False):
                work = native.cast([rows], table, own_places=places, lend=lend)
                assert torch.equal(work.wait_host()[0], expected)
                work.release()
            out = torch.full((8, 3), -1.0)
            native.cast([rows], table, out=[out]).wait_host()
            expected[places] = -1.0
            assert torch.equal(out, expected)
            with pytest.raises(ValueError, match="there are 3 own_places for rows of"):
                native.cast([rows], table, own_places=slice(0, 3))

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
            for places in (torch.tensor([1, 3, 5, 7]), slice(4, 8)):
                into = torch.full((4, num_columns), torch.nan)
                native.reduce([partial], table, [into], own_places=places).wait_host()
                assert torch.equal(into, partial[places] + there[:, None])
        with pytest.raises(ValueError, match=r"3 own_places for rows of \[\(4, "):
            native.reduce([partial], table, [into], own_places=slice(5, 8))
        with pytest.raises(ValueError, match="'lse' takes no own_places"):
            native.reduce([partial], table, [into], "lse", partial, into, own_places=places)

    run_ranks(2, run)


@pytest.mark.parametrize("transport", ["copy_engine", "push", "put"])
def test_own_rows_that_cannot_be_copied_cost_no_slot(transport):
    def run(rank, group):
        native = GroupContext(group, ContextOptions(transport=transport, timeout_s=30))
        table = ExchangeTable(np.array([[1 - rank, 0, 4]]), np.array([[1 - rank, 0, 4]]), 2, 4, 8)
        rows, partial, nowhere = torch.full((4, 3), float(rank)), torch.zeros(8, 3), torch.tensor([4, 5, 6, 99])
        for _ in range(5):
            with pytest.raises(IndexError, match="99"):
                native.cast([rows], table, own_places=nowhere)
            with pytest.raises(IndexError, match="99"):
                native.reduce([partial], table, [torch.zeros(4, 3)], own_places=nowhere)
        for turn in range(5):
            received = native.cast([rows + turn], table, own_places=slice(4, 8)).wait_host()[0]
            assert torch.equal(received, torch.cat([torch.full_like(rows, 1 - rank), rows]) + turn)
            into = torch.zeros(4, 3)
            native.reduce([received], table, [into], own_places=slice(4, 8)).wait_host()
            assert torch.equal(into, 2 * (rows + turn))

    run_ranks(2, run)


@pytest.mark.parametrize("transport", ["copy_engine", "push", "put"])
@pytest.mark.parametrize("is_cast", [True, False], ids=["cast", "reduce"])
def test_what_a_failed_call_sends_is_sent_before_its_rows_may_go(transport, is_cast):
    """Rank 0's calls fail once they have begun to send, and what its stream does next overwrites the rows."""

    def run(rank, group):
        native = GroupContext(group, ContextOptions(transport=transport, timeout_s=30))
        table = ExchangeTable(np.array([[1 - rank, 0, 4]]), np.array([[1 - rank, 0, 4]]), 2, 4, 4)
        nowhere = torch.tensor([1, 2, 3, 99])
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
            work = native.cast([torch.full((4, 3), float(turn))], table, own_places=slice(4, 8), lend=True)
            work.precede(reader)
            (received,) = work.wait()
            reader.enqueue(lambda received=received, turn=turn: read(received, turn))
            work._release_behind(reader)
        reader.synchronize()
        assert not wrong

    run_ranks(2, run)
