# SPDX-License-Identifier: Apache-2.0
"""Contexts over emulated GPUs: everything but the driver and the kernels, without a GPU."""

import ctypes
import functools
import gc
import threading
import time
import weakref

import numpy as np
import pytest
import torch

from magi_attention.comm.streams import EventPool
from magi_attention.plan.exchange import ExchangeTable
from magi_comm_grpcoll import (
    CapacityError,
    ContextOptions,
    GroupContext,
    NativeCollectives,
    SlotLentError,
    routes,
    wires,
)
from magi_comm_grpcoll.driver import WRITE_VALUE
from magi_comm_grpcoll.work import NativeWork
from tests.comm.emulated_kernels import Driver
from tests.comm.emulated_streams import Stream, copy, current_stream, machine
from tests.comm.emulation import run_ranks
from tests.comm.test_native import fragmented_table
from tests.distributed.exchanges import RandomNeeds, random_tensor

pytestmark = pytest.mark.usefixtures("emulated")


@pytest.mark.parametrize("transport", ["copy_engine", "push", "put", None])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_casts_and_reduces(transport, num_ranks):
    all_needs = [RandomNeeds(seed, num_ranks, 0.6, max_rows=20) for seed in range(3)]

    def run(rank, group):
        native = GroupContext(group, ContextOptions(transport=transport, timeout_s=30))
        for turn in range(4):
            for needs in all_needs:
                table = needs.tables[rank]
                shapes = [((4, 4), torch.float32), ((3,), torch.bfloat16), *[((8,), torch.int64)] * 4]
                sources = [
                    [
                        random_tensor(turn + 10 * r + i, (needs.num_rows[r], *shape), dtype)
                        for i, (shape, dtype) in enumerate(shapes)
                    ]
                    for r in range(num_ranks)
                ]
                work = native.cast(sources[rank], table, lend=turn % 2 == 1)
                received = work.wait_host()
                for i, got in enumerate(received):
                    assert torch.equal(got, needs.received([of_rank[i] for of_rank in sources], rank))
                partial = received[0].clone()
                work.release()
                total = sources[rank][0].clone()
                if turn == 1:
                    total = torch.stack([total, total], dim=-1)[..., 1]  # not contiguous
                native.reduce([partial], table, [total], "avg" if turn == 3 else "sum").wait_host()
                counts = torch.tensor([len(needs.partials_of(rank, row)) for row in range(len(total))])[:, None, None]
                expected = sources[rank][0] * (1 + counts if turn < 3 else 1)
                torch.testing.assert_close(total, expected)
        native.close()

    for needs in all_needs:
        needs.tables = [needs.table(rank) for rank in range(num_ranks)]
    run_ranks(num_ranks, run)


@pytest.mark.parametrize("transport", ["copy_engine", "put"])
def test_no_more_than_so_much_is_kept_for_sets_of_senders(transport, monkeypatch):
    monkeypatch.setattr(wires, "MOST_KNOWN", 2)
    all_needs = [RandomNeeds(seed, 3, 0.3, max_rows=6) for seed in range(12)]

    def run(rank, group):
        native, seen = GroupContext(group, ContextOptions(transport=transport, timeout_s=30)), set()
        for needs in all_needs * 2:
            sources = [random_tensor(r, (needs.num_rows[r], 4), torch.float32) for r in range(3)]
            table = needs.table(rank)
            (received,) = native.cast([sources[rank]], table).wait_host()
            assert torch.equal(received, needs.received(sources, rank))
            seen.add(tuple(np.flatnonzero(table.recv_counts).tolist()))
        of_casts = native._lanes[0].wires
        assert len(of_casts._before_reading) <= 2
        assert transport != "put" or len(of_casts._seeing) <= 2
        native.close()
        return len(seen)

    assert max(run_ranks(3, run)) > 2


def test_what_is_told_goes_behind_a_fence_for_all_data(monkeypatch):
    """A copy tells the others; between it and any copy before, its word is written in order, with a fence."""
    calls = []

    class Recorder(Driver):
        def copy(self, targets, sources, sizes, count, stream):
            columns = [np.ctypeslib.as_array((ctypes.c_uint64 * count).from_address(at)) for at in (targets, sources)]
            calls.append((stream, "copy", *(column.tolist() for column in columns)))
            super().copy(targets, sources, sizes, count, stream)

        def enqueue_memory_operations(self, operations, count, stream):
            words = np.ctypeslib.as_array((ctypes.c_uint64 * (6 * count)).from_address(operations)).reshape(count, 6)
            fenced = words[(words[:, 0] == WRITE_VALUE) & (words[:, 3] == 0)]
            calls.append((stream, "write", fenced[:, 1].tolist(), []))
            super().enqueue_memory_operations(operations, count, stream)

    monkeypatch.setattr(wires, "driver", Recorder)
    monkeypatch.setattr(routes, "driver", Recorder)

    def run(rank, group):
        native = GroupContext(group, ContextOptions(transport="copy_engine", timeout_s=30))
        table = fragmented_table(rank, 3, 4, 2)
        for _ in range(3):
            (received,) = native.cast([torch.ones(table.num_source, 4)], table).wait_host()
            native.reduce([received], table, [torch.zeros(table.num_source, 4)]).wait_host()
        native.close()
        return native._control.addresses, len(native._control.local), native._streams.send.cuda_stream

    told = run_ranks(3, run)
    controls, size, _ = told[0]
    num_letters = 0
    for stream in {stream for stream, *_ in calls}:
        written = None  # since the copies before
        for _, what, targets, sources in (call for call in calls if call[0] == stream):
            if what == "write":
                written = targets
            elif any(0 <= target - control < size for target in targets for control in controls):
                assert written is not None
                assert set(sources) <= set(written)
                num_letters += 1
                written = None
            else:
                assert stream in {send for *_, send in told}
                written = None
    assert num_letters == 3 * 2 * 3 * 2  # ranks, arrivals and credits, turns, casts and reduces


@pytest.mark.parametrize(("transport", "capacity"), [(None, 8 << 20), ("put", 12 << 20)])
def test_rounds_and_capacity(transport, capacity):
    needs = RandomNeeds(1, 2, 0.9, max_rows=2000)

    def run(rank, group):
        native = GroupContext(group, ContextOptions(transport=transport, capacity_bytes=capacity, timeout_s=30))
        table = needs.table(rank)
        sources = [random_tensor(r, (needs.num_rows[r], 1024), torch.float32) for r in range(2)]
        for lend in (True, False):
            work = native.cast([sources[rank]], table, lend=lend)
            (received,) = work.wait_host()
            assert torch.equal(received, needs.received(sources, rank))
            work.release()
        total = torch.zeros_like(sources[rank])
        native.reduce([received], table, [total]).wait_host()
        counts = torch.tensor([len(needs.partials_of(rank, row)) for row in range(len(total))])[:, None]
        torch.testing.assert_close(total, sources[rank] * counts)
        with pytest.raises(CapacityError, match="but 2097152 is the most"):
            native.cast([torch.zeros(1, 1 << 20).expand(len(total), -1)], needs.table(rank))

    run_ranks(2, run)


def test_a_cast_in_rounds_sends_nothing_while_too_much_is_lent():
    needs = RandomNeeds(1, 2, 0.9, max_rows=2000)

    def run(rank, group):
        native = GroupContext(group, ContextOptions(capacity_bytes=8 << 20, timeout_s=30))
        table, num_rows = needs.table(rank), needs.num_rows
        sources = [random_tensor(r, (num_rows[r], 1024), torch.float32) for r in range(2)]
        native.cast([sources[rank]], table).wait_host()
        ring = native._lanes[0].exchange._ring
        lent = native.cast([sources[rank][:, :4]], table, lend=True)
        num_begun = ring._num_begun
        with pytest.raises(SlotLentError, match=r"hold 1 of 2 slots, and \d+ more are needed: release the oldest"):
            native.cast([sources[rank]], table)
        assert ring._num_begun == num_begun
        lent.release()
        (received,) = native.cast([sources[rank]], table).wait_host()
        assert torch.equal(received, needs.received(sources, rank))
        native.close()

    run_ranks(2, run)


def test_conjugations_and_negations_that_are_only_noted_travel():
    needs = RandomNeeds(2, 2, 0.9, max_rows=9)
    draw = torch.Generator().manual_seed(0)
    sources = [torch.randn(rows, 4, dtype=torch.complex64, generator=draw).conj() for rows in needs.num_rows]

    def run(rank, group):
        native, table = GroupContext(group, ContextOptions(timeout_s=30)), needs.table(rank)
        received = native.cast([sources[rank], sources[rank].imag], table).wait_host()
        for number, of_all in enumerate((sources, [source.imag for source in sources])):
            assert torch.equal(received[number], needs.received([x.resolve_conj().resolve_neg() for x in of_all], rank))
        native.close()

    run_ranks(2, run)


def test_a_default_device_changes_nothing():
    needs = RandomNeeds(5, 2, 0.8, max_rows=20)
    sources = [random_tensor(rank, (rows, 8), torch.float32) for rank, rows in enumerate(needs.num_rows)]

    def run(rank, group):
        with torch.device("meta"):
            native, table = GroupContext(group, ContextOptions(timeout_s=30)), needs.table(rank)
            (received,) = native.cast([sources[rank]], table).wait_host()
        assert torch.equal(received, needs.received(sources, rank))
        native.close()

    run_ranks(2, run)


def test_a_context_may_go_with_all_its_exchanges_under_way():
    def run(rank, group):
        native, table = GroupContext(group, ContextOptions(timeout_s=30)), fragmented_table(rank, 2, 4, 2)
        begin = threading.Event()
        torch.cuda.current_stream().enqueue(lambda: begin.wait(20) or pytest.fail("nothing was under way"))
        rows = torch.ones(table.num_source, 4)
        for work in [native.cast([rows], table, lend=True) for _ in range(2)]:
            work.wait()
            work.release()
        context_of_rank, table = weakref.ref(native), None
        del native, rows, work
        gc.collect()
        assert context_of_rank() is None
        time.sleep(0.2)  # the watchdog has seen that it is gone
        begin.set()
        torch.cuda.current_stream().synchronize()

    run_ranks(2, run)


def test_graphs_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

    def run(rank, group):
        native, table = GroupContext(group, ContextOptions(timeout_s=30)), fragmented_table(rank, 2, 2, 2)
        rows = torch.ones(table.num_source, 4)
        with pytest.raises(RuntimeError, match="can't be captured in a CUDA graph"):
            native.cast([rows], table)
        with pytest.raises(RuntimeError, match="can't be captured in a CUDA graph"):
            native.reduce([torch.ones(table.num_received, 4)], table, [rows])

    run_ranks(2, run)


def test_what_is_lent_goes_back_behind_its_readers_whoever_drops_it():
    stream, reader, told = Stream(), Stream(), []
    work = NativeWork(
        stream, reader, None, [], None, lambda: None, lambda behind: told.append(behind.record_event()), EventPool()
    )
    work.wait()
    reads = threading.Event()
    reader.enqueue(reads.wait)
    works = [work]
    del work
    thread = threading.Thread(target=works.clear)  # as the collector of cycles may, on any thread
    thread.start()
    thread.join()
    (is_read,) = told
    assert not is_read.done.wait(0.1)
    reads.set()
    is_read.synchronize()


@pytest.mark.parametrize("transport", ["copy_engine", "push"])
def test_rows_go_home_as_soon_as_they_are_there(transport):
    """By the copy engine: what they are added to is there when the caller's stream has done all that it was given."""
    num_rows = 6
    sent, own = ([random_tensor(seed + rank, (num_rows, 4), torch.float32) for rank in range(2)] for seed in (0, 10))
    for x in (sent, own):
        x[:] = [each.clone() for each in x]  # to memory that streams may use

    def run(rank, group):
        native = GroupContext(group, ContextOptions(transport=transport, timeout_s=30))
        whole = np.array([[1 - rank, 0, num_rows]])
        table = ExchangeTable(send=whole, recv=whole, num_ranks=2, num_source=num_rows, num_received=num_rows)
        native.reduce([torch.zeros(num_rows, 4)], table, [torch.zeros(num_rows, 4)]).wait_host()  # makes slots
        partial, total = torch.full((num_rows, 4), torch.nan), torch.full((num_rows, 4), torch.nan)
        are_there, goes_on, emulated = threading.Event(), threading.Event(), machine()
        caller, num_bytes = current_stream(), partial.nbytes
        caller.enqueue(functools.partial(copy, partial.data_ptr(), sent[rank].data_ptr(), num_bytes))
        caller.enqueue(are_there.set)
        caller.enqueue(lambda: emulated.until(goes_on.is_set))
        caller.enqueue(functools.partial(copy, total.data_ptr(), own[rank].data_ptr(), num_bytes))

        def rows_there(stream):
            stream.enqueue(lambda: emulated.until(are_there.is_set))

        work = native.reduce([partial], table, [total], rows_there=rows_there)
        is_sent = native._streams.send.record_event().done
        assert is_sent.wait(10 if transport == "copy_engine" else 0.2) == (transport == "copy_engine")
        goes_on.set()
        work.wait_host()
        assert torch.equal(total, own[rank] + sent[1 - rank])
        native.close()

    run_ranks(2, run)


def test_rows_of_a_copy_are_there_when_the_copy_is():
    def run(rank, group):
        native = GroupContext(group, ContextOptions(transport="copy_engine", timeout_s=30))
        whole = np.array([[1 - rank, 0, 5]])
        table = ExchangeTable(send=whole, recv=whole, num_ranks=2, num_source=5, num_received=5)
        total, refuse = torch.zeros(5, 4), lambda stream: pytest.fail("the rows sent are others")
        native.reduce([torch.ones(4, 5).T], table, [total], rows_there=refuse).wait_host()
        assert torch.equal(total, torch.ones(5, 4))
        native.close()

    run_ranks(2, run)


@pytest.mark.parametrize(("transport", "expected"), [(None, True), ("copy_engine", True), ("push", False)])
def test_copies_may_begin_before_the_callers_stream_is_done(transport, expected):
    def ask(rank, group):
        native = object.__new__(NativeCollectives)
        native.context = GroupContext(group, ContextOptions(transport=transport, timeout_s=30))
        native.needs_multiprocessors = native.context.needs_multiprocessors
        early = native.sends_early(fragmented_table(rank, 2, 4, 2), torch.device("cuda"))
        native.context.close()
        return early

    assert run_ranks(2, ask) == [expected] * 2


def test_without_a_context_it_is_all_to_alls_to_say(monkeypatch):
    native, asked = NativeCollectives(None), []
    monkeypatch.setattr(native.fallback, "sends_early", lambda *given: asked.append(given) or "maybe")
    assert native.sends_early("table", "device") == "maybe"
    assert asked == [("table", "device")]
