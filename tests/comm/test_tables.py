# SPDX-License-Identifier: Apache-2.0
"""The tables of pieces to copy do what casts and reduces must do, carried out in numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from magi_attention.comm.packing import RowFormat
from magi_attention.plan.exchange import ExchangeTable
from magi_comm_grpcoll.driver import WAIT_VALUE, WRITE_VALUE, memory_operations
from magi_comm_grpcoll.errors import PlanMismatchError
from magi_comm_grpcoll.plans import make_plans
from magi_comm_grpcoll.puts import stage
from magi_comm_grpcoll.tables import ALIGNMENT, TASK, ByteCopies, cast_copies, check_match, cut, tasks_of
from tests.distributed.exchanges import RandomNeeds

cases = st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 6), st.sampled_from([0.1, 0.5, 0.9]))
FORMATS = [
    (RowFormat(torch.bfloat16, torch.Size([2, 4])), RowFormat(torch.float32, torch.Size([3]))),
    (RowFormat(torch.uint8, torch.Size([1])),),
    (
        RowFormat(torch.float64, torch.Size([])),
        RowFormat(torch.int16, torch.Size([0])),
        *[RowFormat(torch.int8, torch.Size([5]))] * 4,
    ),
]


def plan_of(operation, tables, formats, rank):
    (plan,) = make_plans(operation, tables, formats, rank)
    return plan


def random_rows(rng: np.random.Generator, num_rows: int, row: RowFormat) -> np.ndarray:
    return rng.integers(0, 256, (num_rows, row.num_elements * row.dtype.itemsize), np.uint8)


def carry_out(plans, sources: list[list[np.ndarray]], most_bytes: int) -> list[np.ndarray]:
    """Do what all ranks' pieces say; returns every rank's slot. Bytes that nobody writes are 255."""
    slots = [np.full(plan.layout.sizes[rank], 255, np.uint8) for rank, plan in enumerate(plans)]
    written = [np.zeros(len(slot), int) for slot in slots]
    for plan, tensors in zip(plans, sources, strict=True):
        for task in tasks_of(cut(plan.copies, most_bytes)):
            source, target, size, tensor, peer = task.tolist()
            assert 0 < size <= most_bytes
            slots[peer][target : target + size] = tensors[tensor].ravel()[source : source + size]
            written[peer][target : target + size] += 1
    assert all((counts <= 1).all() for counts in written)
    return slots


def tensor_in(slot: np.ndarray, start: int, num_rows: int, row_bytes: int) -> np.ndarray:
    assert start % ALIGNMENT == 0
    return slot[start : start + num_rows * row_bytes].reshape(num_rows, row_bytes)


@given(cases, st.sampled_from(FORMATS), st.sampled_from([1, 7, 64, 1 << 15]))
def test_cast_brings_every_row_to_its_place(case, formats, most_bytes):
    seed, num_ranks, share = case
    needs, rng = RandomNeeds(seed, num_ranks, share), np.random.default_rng(seed)
    tables = [needs.table(rank) for rank in range(num_ranks)]
    sources = [[random_rows(rng, needs.num_rows[rank], row) for row in formats] for rank in range(num_ranks)]
    plans = [plan_of("cast", tables, formats, rank) for rank in range(num_ranks)]
    slots = carry_out(plans, sources, most_bytes)
    for rank, plan in enumerate(plans):
        assert set(plan.sources) == {int(owner) for owner in needs.needs[rank][:, 0]}
        for number, row in enumerate(formats):
            width = row.num_elements * row.dtype.itemsize
            arrived = tensor_in(slots[rank], plan.layout.starts[rank, number], len(needs.needs[rank]), width)
            for place, (owner, index) in enumerate(needs.needs[rank]):
                assert np.array_equal(arrived[place], sources[owner][number][index])


@given(cases, st.sampled_from(FORMATS))
def test_reduce_brings_partials_to_slots_in_the_order_of_the_ranks(case, formats):
    seed, num_ranks, share = case
    needs, rng = RandomNeeds(seed, num_ranks, share), np.random.default_rng(seed)
    tables = [needs.table(rank) for rank in range(num_ranks)]
    partials = [[random_rows(rng, len(needs.needs[rank]), row) for row in formats] for rank in range(num_ranks)]
    plans = [plan_of("reduce", tables, formats, rank) for rank in range(num_ranks)]
    slots = carry_out(plans, partials, 64)
    for owner, plan in enumerate(plans):
        # The slots' rows, as the reduction numbers them: everything sent, by ascending peer.
        sent = [(peer, row) for peer, start, stop in tables[owner].send.tolist() for row in range(start, stop)]
        for number, row in enumerate(formats):
            width = row.num_elements * row.dtype.itemsize
            arrived = tensor_in(slots[owner], plan.layout.starts[owner, number], len(sent), width)
            for place, (peer, index) in enumerate(sent):
                ((_, at),) = [found for found in needs.partials_of(owner, index) if found[0] == peer]
                assert np.array_equal(arrived[place], partials[peer][number][at])


@given(cases, st.integers(2, 9))
def test_rounds_bring_every_row_once_and_all_partials_of_a_row_together(case, num_rounds):
    seed, num_ranks, share = case
    formats = FORMATS[0]
    needs, rng = RandomNeeds(seed, num_ranks, share), np.random.default_rng(seed)
    tables = [needs.table(rank) for rank in range(num_ranks)]
    sources = [[random_rows(rng, needs.num_rows[rank], row) for row in formats] for rank in range(num_ranks)]
    casts = [make_plans("cast", tables, formats, rank, num_rounds) for rank in range(num_ranks)]
    received = [[np.full((len(needed), 16), 255, np.uint8) for _ in formats] for needed in needs.needs]
    for plans in zip(*casts, strict=True):
        slots = carry_out(plans, sources, 64)
        for rank, plan in enumerate(plans):
            for number, row in enumerate(formats):
                width = row.num_elements * row.dtype.itemsize
                rows = tensor_in(slots[rank], plan.layout.starts[rank, number], plan.num_rows, width)
                received[rank][number][plan.landing, :width] = rows
    for rank, needed in enumerate(needs.needs):
        assert sorted(np.concatenate([plan.landing for plan in casts[rank]])) == list(range(len(needed)))
        for place, (owner, index) in enumerate(needed):
            assert np.array_equal(received[rank][0][place], sources[owner][0][index])
    for owner in range(num_ranks):
        rounds = make_plans("reduce", tables, formats, owner, num_rounds)
        sent = [{row for _, start, stop in plan.table.send.tolist() for row in range(start, stop)} for plan in rounds]
        assert sum(map(len, sent)) == len(set().union(*sent))
        assert sum(plan.num_rows for plan in rounds) == sum(tables[owner].send_counts)


@given(cases, st.sampled_from(FORMATS), st.sampled_from(["cast", "reduce"]))
def test_what_is_staged_lies_together_and_fits_on_all_ranks(case, formats, operation):
    seed, num_ranks, share = case
    needs = RandomNeeds(seed, num_ranks, share)
    tables = [needs.table(rank) for rank in range(num_ranks)]
    plans = [make_plans(operation, tables, formats, rank, is_staged=True)[0] for rank in range(num_ranks)]
    assert len({plan.stage_bytes for plan in plans}) == 1
    rng = np.random.default_rng(seed)
    for rank, plan in enumerate(plans):
        there, onward = stage(plan.copies, rank)
        total = int(plan.copies.size.sum())
        assert total <= plan.stage_bytes <= plan.slot_bytes
        tensors = [random_rows(rng, plan.table.num_source + plan.table.num_received, row).ravel() for row in formats]
        staged = np.zeros(total, np.uint8)
        for tensor, peer, source, target, size in zip(*(column.tolist() for column in there), strict=True):
            assert peer == rank
            staged[target : target + size] = tensors[tensor][source : source + size]
        for direct, (tensor, peer, source, target, size) in zip(
            zip(*(column.tolist() for column in plan.copies), strict=True),
            zip(*(column.tolist() for column in onward), strict=True),
            strict=True,
        ):
            assert (tensor, peer, target, size) == (0, direct[1], direct[3], direct[4])
            expected = tensors[direct[0]][direct[2] : direct[2] + size]
            assert (staged[source : source + size] == expected).all()


def table(send, recv, num_ranks=2, num_source=8) -> ExchangeTable:
    send, recv = (np.array(ranges, np.int64).reshape(-1, 3) for ranges in (send, recv))
    return ExchangeTable(send, recv, num_ranks, num_source, int((recv[:, 2] - recv[:, 1]).sum()))


def test_runs_that_continue_each_other_on_both_sides_are_one():
    sender = table([(1, 0, 2), (1, 2, 5), (1, 6, 8)], [])
    receiver = table([], [(0, 0, 4), (0, 4, 7)])
    copies = cast_copies([sender, receiver], 0)
    assert [column.tolist() for column in copies] == [[1, 1], [0, 6], [0, 5], [5, 2]]
    apart = table([], [(0, 0, 3), (0, 5, 9)])
    assert cast_copies([sender, apart], 0).rows.tolist() == [3, 2, 2]


def test_ranks_that_start_together_send_to_different_peers():
    everything = [
        table([(peer, 0, 8) for peer in range(4)], [(peer, 8 * peer, 8 * peer + 8) for peer in range(4)], 4)
    ] * 4
    row = (RowFormat(torch.int8, torch.Size([16])),)
    firsts = [plan_of("cast", everything, row, rank).copies.peer for rank in range(4)]
    for turn in zip(*firsts, strict=True):
        assert sorted(turn) == [0, 1, 2, 3]
    assert cut(plan_of("cast", everything, row, 0).copies, 64).peer.tolist() == [1, 2, 3, 0] * 2


def test_tables_that_do_not_match_are_refused_with_the_ranks():
    with pytest.raises(PlanMismatchError, match="rank 0 sends 3 rows to rank 1, which expects 2; 1 pairs"):
        check_match([table([(1, 0, 3)], []), table([], [(0, 0, 2)])])
    with pytest.raises(PlanMismatchError, match="rank 1's table is for 3 ranks, not 2"):
        check_match([table([], []), table([], [], num_ranks=3)])


def test_granule_is_what_divides_everything():
    def granule(source: int, target: int, size: int) -> int:
        return ByteCopies(*(np.array([value]) for value in (0, 0, source, target, size))).granule

    assert [granule(0, 32, 16), granule(8, 0, 32), granule(4, 4, 4), granule(0, 2, 8), granule(0, 0, 33)] == [
        16,
        8,
        4,
        2,
        1,
    ]


def test_memory_operations_have_the_layout_of_the_union():
    operations = memory_operations((WRITE_VALUE, np.array([64])), (WAIT_VALUE, np.array([8, 16])))
    assert operations.itemsize == 48
    words = operations.view(np.uint64).reshape(3, 6)
    assert words[:, 0].tolist() == [WRITE_VALUE, WAIT_VALUE, WAIT_VALUE]
    assert words[:, 1].tolist() == [64, 8, 16]
    operations["value"][1:].fill(7)
    assert words[:, 2].tolist() == [0, 7, 7]
    assert not words[:, 3:].any()


def test_tasks_have_the_layout_of_the_struct():
    assert TASK.itemsize == 24
    assert [TASK.fields[name][1] for name in TASK.names] == [0, 8, 16, 20, 22]
