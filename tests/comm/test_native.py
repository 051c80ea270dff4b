# SPDX-License-Identifier: Apache-2.0
"""Native casts and reduces on real GPUs: the same bits as all-to-all, by every transport, in every interleaving.

With fewer GPUs than ranks, all ranks share one: the same protocol, at another speed.
"""

import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist

from magi_attention.comm.routes import places_of
from magi_attention.plan.exchange import ExchangeTable
from magi_comm_grpcoll import (
    CapacityError,
    ContextOptions,
    GroupContext,
    NativeCollectives,
    PlanMismatchError,
    SlotLentError,
)
from tests.comm.ranks import NO_PUTS, Reference, device, make_pool
from tests.comm.wrong import LastWrong, tell_apart
from tests.distributed.exchanges import RandomNeeds, random_tensor

# "heap" stands for the faster of copy engines and push, in memory of NVSHMEM.
TRANSPORTS = ["copy_engine", "push", None, *([] if NO_PUTS else ["put", "heap"])]
PUT = pytest.param("put", marks=pytest.mark.skipif(bool(NO_PUTS), reason=NO_PUTS))
HEAP = pytest.param("heap", marks=PUT.marks)
# Rows of 16 bytes and more that bulk copies take, and others that they don't.
FORMATS = [
    [((8, 128), torch.bfloat16), ((8, 128), torch.bfloat16)],
    [((2, 4), torch.bfloat16), ((3,), torch.float16), ((), torch.float32), ((5, 1), torch.float64), ((7,), torch.bool)],
    [((2,), torch.int64)],
    [((3, 3), torch.bool)],
]
REDUCED = [
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
]


@pytest.fixture(scope="module", params=[pytest.param(n, marks=pytest.mark.gpu(1)) for n in (2, 4)])
def pool(request):
    with make_pool(request.param) as pool:
        yield pool


_IN_HEAP = ContextOptions(allocator="nvshmem", timeout_s=30)
_contexts: dict[tuple[str | None, int], GroupContext] = {}


def context(transport: str | None = None, number: int = 0) -> GroupContext:
    """One context per transport and number, kept by the rank's process."""
    key = transport, number
    if key not in _contexts:
        options = ContextOptions(transport=transport, timeout_s=30) if transport != "heap" else _IN_HEAP
        _contexts[key] = GroupContext(dist.group.WORLD, options)
    return _contexts[key]


def fragmented_table(rank: int, num_ranks: int, num_ranges: int, rows: int, seed: int = 0) -> ExchangeTable:
    """Everybody sends ranges of ``rows`` rows to everybody, itself included, which end up in mixed order."""
    order = np.random.default_rng(seed).permutation(num_ranges * num_ranks) * rows
    send = [(peer, i * rows, (i + 1) * rows) for peer in range(num_ranks) for i in range(num_ranges)]
    recv = [(p, at, at + rows) for p in range(num_ranks) for at in order[p * num_ranges : (p + 1) * num_ranges]]
    total = num_ranges * rows
    return ExchangeTable(np.array(send), np.array(recv), num_ranks, total, total * num_ranks)


def compare_casts(rank: int, world_size: int, transport: str | None, seed: int) -> None:
    needs = RandomNeeds(seed, world_size, 0.5, max_rows=200)
    native, reference = context(transport), Reference()
    for table in (needs.table(rank), fragmented_table(rank, world_size, 37, 3, seed)):
        for specs in FORMATS:
            mine = [
                random_tensor(97 * rank + i, (table.num_source, *shape), dtype).to(device())
                for i, (shape, dtype) in enumerate(specs)
            ]
            expected = reference.cast(mine, table)
            for lend in (False, True):
                work = native.cast(mine, table, lend=lend)
                for got, wanted in zip(work.wait(), expected, strict=True):
                    assert got.is_contiguous()
                    assert got.dtype == wanted.dtype
                    assert torch.equal(got, wanted), (transport, seed, specs, lend)
                work.release()
            whole = [x.new_full((len(x) + 2, *x.shape[1:]), 1) for x in expected]
            got = native.cast(mine, table, out=[x[2:] for x in whole]).wait()
            assert all(torch.equal(x[2:], wanted) for x, wanted in zip(whole, expected, strict=True))
            assert all(x.data_ptr() == y[2:].data_ptr() for x, y in zip(got, whole, strict=True))
    torch.cuda.synchronize()


@pytest.mark.parametrize("transport", ["copy_engine", "push", None, PUT, HEAP])
def test_casts_have_the_bits_of_all_to_all(pool, transport):
    for seed in range(4):
        pool.run(compare_casts, transport, seed, timeout_s=60)


def compare_reduces(rank: int, world_size: int, seed: int) -> None:
    needs = RandomNeeds(seed, world_size, 0.7, max_rows=200)
    reference = Reference()
    for table in (needs.table(rank), fragmented_table(rank, world_size, 37, 3, seed)):
        for partial_dtype, dtype in REDUCED:
            for shape in ((8, 128), (5, 3)):
                partials = [
                    random_tensor(rank + i, (table.num_received, *shape), partial_dtype).to(device()) for i in range(2)
                ]
                old = [random_tensor(9 * rank + i, (table.num_source, *shape), dtype).to(device()) for i in range(2)]
                for op in ("sum", "avg"):
                    expected = [x.clone() for x in old]
                    reference.reduce(partials, table, expected, op)
                    for transport in TRANSPORTS:
                        got = [x.clone() for x in old]
                        context(transport).reduce(partials, table, got, op).wait()
                        same = all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
                        assert same, (transport, seed, op, partial_dtype, dtype, shape)
    torch.cuda.synchronize()


def test_reduces_have_the_bits_of_all_to_all(pool):
    for seed in range(3):
        pool.run(compare_reduces, seed, timeout_s=60)


def compare_merges(rank: int, world_size: int, seed: int) -> None:
    needs = RandomNeeds(seed, world_size, 0.7, max_rows=100)
    table = needs.table(rank)
    reference = Reference()

    def lse_of(number: int, rows: int) -> torch.Tensor:
        lse = random_tensor(number, (rows, 4), torch.float32).to(device()) * 5
        return lse.masked_fill(torch.rand(lse.shape, device=lse.device) < 0.2, -torch.inf)

    for partial_dtype, dtype in REDUCED:
        for dim in (64, 5):
            partial = random_tensor(rank, (table.num_received, 4, dim), partial_dtype).to(device())
            partial_lse = lse_of(rank + 50, table.num_received)
            partial[partial_lse == -torch.inf] = torch.nan
            old, old_lse = (
                random_tensor(rank + 7, (table.num_source, 4, dim), dtype).to(device()),
                lse_of(rank + 90, table.num_source),
            )
            results = [(old.clone(), old_lse.clone()) for _ in range(1 + len(TRANSPORTS))]
            reference.reduce([partial], table, [results[0][0]], "lse", partial_lse, results[0][1])
            for (out, lse), native in zip(results[1:], map(context, TRANSPORTS), strict=True):
                native.reduce([partial], table, [out], "lse", partial_lse, lse).wait()
            case = f"seed {seed}, rank {rank}, {partial_dtype} onto {dtype}, {dim} columns"
            for kind, (wanted, *found), before in zip(
                ("rows", "lse"), zip(*results, strict=True), (old, old_lse), strict=True
            ):
                torch.testing.assert_close(found[0], wanted)
                by_transport = dict(zip(TRANSPORTS, found, strict=True))
                is_same = all(torch.equal(out, found[0]) for out in found)
                assert is_same, f"{case}: {tell_apart(kind, by_transport, before)}"


def test_merges_by_lse_have_the_same_bits_by_every_transport(pool):
    for seed in range(3):
        pool.run(compare_merges, seed, timeout_s=60)


def run_epochs(rank: int, world_size: int, transport: str | None, num_epochs: int) -> None:
    """Casts and reduces without a host synchronization, each rank late at random."""
    table = fragmented_table(rank, world_size, 11, 7)
    random, native = np.random.default_rng(rank), context(transport)
    row = torch.arange(256, device=device(), dtype=torch.float32)
    owner = torch.empty(table.num_received, dtype=torch.float32, device=device())
    for peer, start, stop in table.recv.tolist():
        owner[start:stop] = peer
    rows = LastWrong(row.expand(table.num_received, -1))
    sums = LastWrong(row.expand(table.num_source, -1), world_size)
    works = []

    def be_late() -> None:
        if random.random() < 0.3:
            torch.cuda._sleep(int(random.integers(1, 300_000)))

    def take() -> None:
        epoch, work = works.pop(0)
        (got,) = work.wait()
        be_late()
        rows.look(got, row + (owner + 100 * epoch)[:, None])
        total = torch.zeros(table.num_source, 256, device=device())
        partial = got * 1
        work.release()
        native.reduce([partial], table, [total]).wait()
        rows.look_again(partial)
        sums.look(total, world_size * (row + rank + 100 * epoch))

    for epoch in range(num_epochs):
        source = row.expand(table.num_source, -1) + (rank + 100 * epoch)
        works.append((epoch, native.cast([source.contiguous()], table, lend=True)))
        be_late()
        if len(works) == 2:
            take()
    take()
    told = rows.told(), sums.told()
    assert told == ("", ""), f"{transport}, rank {rank}, rows that were cast: {told[0]}; sums: {told[1]}"


@pytest.mark.parametrize("transport", ["copy_engine", "push", PUT, HEAP])
def test_a_thousand_epochs_under_random_delays(pool, transport):
    pool.run(run_epochs, transport, 1000, timeout_s=100)


def interleave_contexts(rank: int, world_size: int) -> None:
    table = fragmented_table(rank, world_size, 23, 5)
    sources = [random_tensor(rank + 10 * i, (table.num_source, 64), torch.bfloat16).to(device()) for i in range(2)]
    expected = [Reference().cast([x], table)[0] for x in sources]
    natives = [context("copy_engine", 0), context("push", 1)]
    for _ in range(50):
        works = [native.cast([x], table, lend=True) for native, x in zip(natives, sources, strict=True)]
        for work, wanted in zip(works, expected, strict=True):
            assert torch.equal(work.wait()[0], wanted)
            work.release()


def test_two_contexts_at_once(pool):
    pool.run(interleave_contexts, timeout_s=60)


def misuse(rank: int, world_size: int) -> None:
    native, table = context(), fragmented_table(rank, world_size, 3, 4)
    rows = torch.ones(table.num_source, 8, device=device())
    with pytest.raises(ValueError, match=rf"must all have {table.num_source} rows"):
        native.cast([rows[1:]], table)
    with pytest.raises(ValueError, match="on cuda"):
        native.cast([rows.cpu()], table)
    larger = RandomNeeds(0, world_size + 1).table(0)
    with pytest.raises(ValueError, match="can't run in a group of"):
        native.cast([torch.ones(larger.num_source, 8, device=device())], larger)
    with pytest.raises(TypeError, match=r"no kernel combines torch\.float64 onto"):
        native.reduce([rows.new_zeros(table.num_received, 8).double()], table, [rows])
    with pytest.raises(PlanMismatchError, match=r"ranks \[1.*\] of the group call another collective than rank 0"):
        native.cast(
            [rows if rank == 0 else rows.half()],
            fragmented_table(rank, world_size, 3, 4),
        )
    held = [native.cast([rows], table, lend=True) for _ in range(2)]
    with pytest.raises(SlotLentError, match="release the oldest"):
        native.cast([rows], table)
    for work in held:
        work.release()
    del held
    dropped = native.cast([rows], table, lend=True)
    del dropped  # gives back what it lent
    for _ in range(3):
        assert torch.equal(native.cast([rows], table).wait()[0], rows.new_ones(table.num_received, 8))
    small = GroupContext(dist.group.WORLD, ContextOptions(capacity_bytes=8 << 20))
    wide = torch.zeros(table.num_source, 1 << 20, device=device())
    with pytest.raises(CapacityError, match="but 2097152 is the most"):
        small.cast([wide], fragmented_table(rank, world_size, 3, 4))
    small.close()
    with pytest.raises(RuntimeError, match="closed"):
        small.cast([rows], table)


def test_misuse_is_refused(pool):
    pool.run(misuse, timeout_s=60)


def put_own_rows(rank: int, world_size: int) -> None:
    """Every second row of the receive buffer is the rank's own."""
    peer, half = (rank + 1) % world_size, 300
    source, target = (rank - 1) % world_size, np.arange(half) * 2
    recv = np.column_stack([np.full(half, source), target, target + 1])
    table = ExchangeTable(np.array([[peer, 0, half]]), recv, world_size, half, 2 * half)
    rows = [random_tensor(r, (half, 8, 128), torch.bfloat16).to(device()) for r in range(world_size)]
    expected = torch.stack([rows[source], rows[rank]], dim=1).flatten(0, 1)
    places = places_of((np.arange(half) * 2 + 1)[:, None] + [0, 1], device())
    for transport in TRANSPORTS:
        for lend in (True, False):
            for _ in range(3):
                work = context(transport).cast([rows[rank]], table, own_places=places, lend=lend)
                assert torch.equal(work.wait()[0], expected)
                work.release()
        for dtype in (torch.bfloat16, torch.float32):
            into = expected.new_full((half, 8, 128), torch.nan, dtype=dtype)
            context(transport).reduce([expected], table, [into], own_places=places).wait()
            assert torch.equal(into, rows[rank].to(dtype) + rows[rank].to(dtype))


def test_own_rows_lie_among_received_ones(pool):
    pool.run(put_own_rows, timeout_s=60)


def put_long_runs(rank: int, world_size: int) -> None:
    """Every second run of the receive buffers is the rank's own: long enough to be copied by few multiprocessors."""
    peer, source, of_run = (rank + 1) % world_size, (rank - 1) % world_size, 37
    first = np.arange(12) * 2 * of_run
    recv = np.column_stack([np.full(12, source), first, first + of_run])
    table = ExchangeTable(np.array([[peer, 0, 12 * of_run]]), recv, world_size, 12 * of_run, 24 * of_run)
    places = places_of(np.column_stack([first, first + of_run])[::-1] + of_run, device())
    for shapes in ([(8, 128), (8, 64)], [(512, 5)]):
        for turn in range(20):
            seeds = [
                [
                    random_tensor(100 * turn + 10 * i + r, (12 * of_run, *each), torch.bfloat16)
                    for i, each in enumerate(shapes)
                ]
                for r in (source, rank)
            ]
            theirs, own = ([x.to(device()) for x in tensors] for tensors in seeds)
            for transport in TRANSPORTS:
                for lend in (True, False):
                    work = context(transport).cast(own, table, own_places=places, lend=lend)
                    work.wait_packed()
                    for received, mine, other in zip(work.wait(), own, theirs, strict=True):
                        runs = received.view(12, 2, of_run, *received.shape[1:])
                        assert torch.equal(runs[:, 0].flatten(0, 1), other)
                        assert torch.equal(runs.flip(0)[:, 1].flatten(0, 1), mine)
                    work.release()


def test_long_runs_of_own_rows_lie_among_received_ones(pool):
    pool.run(put_long_runs, timeout_s=120)


def use_the_entry_point(rank: int, world_size: int) -> None:
    first, second = NativeCollectives(dist.group.WORLD), NativeCollectives(dist.group.WORLD)
    assert first.context is second.context is not None
    table = fragmented_table(rank, world_size, 3, 4)
    rows = random_tensor(rank, (table.num_source, 8), torch.float64).to(device())
    (received,) = first.cast([rows], table).wait()
    into, expected = torch.zeros_like(rows), torch.zeros_like(rows)
    second.reduce([received], table, [into]).wait()  # no kernel for float64
    Reference().reduce([received], table, [expected])
    assert torch.equal(into, expected)


def test_all_objects_of_a_group_share_a_context(pool):
    pool.run(use_the_entry_point, timeout_s=60)


def run_in_rounds(rank: int, world_size: int) -> None:
    small, whole = GroupContext(dist.group.WORLD, ContextOptions(capacity_bytes=8 << 20)), context()
    for table in (fragmented_table(rank, world_size, 200, 5), RandomNeeds(3, world_size, 0.9, 3000).table(rank)):
        sources = [
            random_tensor(rank + i, (table.num_source, *shape), dtype).to(device())
            for i, (shape, dtype) in enumerate(FORMATS[0])
        ]
        sources = [torch.cat([x, x, x, x], dim=-1) for x in sources]
        expected = whole.cast(sources, table).wait()
        for lend in (False, True):
            work = small.cast(sources, table, lend=lend)
            assert all(torch.equal(x, y) for x, y in zip(work.wait(), expected, strict=True))
            work.release()
        for op in ("sum", "avg"):
            totals = [[x.clone() for x in sources] for _ in range(2)]
            whole.reduce(expected, table, totals[0], op).wait()
            small.reduce(expected, table, totals[1], op).wait()
            assert all(torch.equal(x, y) for x, y in zip(*totals, strict=True))
    small.close()


def test_what_does_not_fit_goes_in_rounds_with_the_same_bits(pool):
    pool.run(run_in_rounds, timeout_s=60)


def cast_once(rank: int, world_size: int, transport: str) -> None:
    table = fragmented_table(rank, world_size, 3, 4)
    native = context(transport)
    (received,) = native.cast([torch.ones(table.num_source, 8, device=device())], table).wait()
    assert (received == 1).all()
    native.reduce([received], table, [torch.ones(table.num_source, 8, device=device())]).wait()


@pytest.mark.gpu(1)
@pytest.mark.parametrize("transport", ["copy_engine", PUT, HEAP])
def test_processes_end_by_themselves(transport):
    with make_pool(2) as pool:
        pool.run(cast_once, transport, timeout_s=60)
        processes = [*pool._processes]
        for pipe in pool._pipes:
            pipe.send_bytes(pickle.dumps(None))
        for process in processes:
            process.join(20)
        assert [process.exitcode for process in processes] == [0, 0]
