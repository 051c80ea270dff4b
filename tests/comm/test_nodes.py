# SPDX-License-Identifier: Apache-2.0
"""Groups over several nodes, here virtual ones: natively inside a node, each row once from node to node."""

import logging
import os

import pytest
import torch
import torch.distributed as dist

from magi_attention.comm import AllToAllCollectives
from magi_attention.testing.distributed import RankPool
from magi_comm_grpcoll import NativeCollectives, collectives
from magi_comm_grpcoll.context import GroupContext
from magi_comm_grpcoll.errors import CapacityError
from magi_comm_grpcoll.heap import SWITCH_OFF
from magi_comm_grpcoll.nodes import RelayedCollectives, ranks_per_node, subgroups
from tests.comm.ranks import NO_PUTS, make_pool
from tests.comm.test_native import fragmented_table
from tests.distributed.exchanges import RandomNeeds, random_tensor

PER_NODE = 2


@pytest.fixture(scope="module")
def pool():
    with RankPool(4) as pool:
        yield pool


@pytest.fixture(scope="module")
def gpu_pool():
    with make_pool(4) as pool:
        yield pool


# By whether rows may be put across: NVSHMEM serves one group in a process, so all tests share these.
_groups: dict[bool, dist.ProcessGroup] = {}


def over_virtual_nodes(rank: int, per_node: int, device: torch.device, puts: bool = False) -> NativeCollectives:
    """Collectives of all ranks, which take themselves for those of other hosts."""
    collectives.host = lambda: f"host {rank // per_node}"
    os.environ[SWITCH_OFF] = "0" if puts else "1"
    if puts not in _groups:
        _groups[puts] = dist.new_group(range(dist.get_world_size()))
    native = NativeCollectives(_groups[puts])
    assert isinstance(native.context, RelayedCollectives)
    assert NativeCollectives(_groups[puts]).context is native.context
    inter, intra = native.context._hops._inter, native.context._hops._intra
    assert isinstance(inter, NativeCollectives)
    assert isinstance(intra, NativeCollectives)
    assert (intra.context is None) == (device.type == "cpu")
    assert intra.context is None or isinstance(intra.context, GroupContext)
    assert (inter.context is not None) == puts
    assert inter.context is None or inter.context.options.transport == "put"
    return native


def compare(rank: int, world_size: int, device_type: str, puts: bool = False) -> None:
    device = torch.device(device_type)
    native = over_virtual_nodes(rank, PER_NODE, device, puts)
    for seed in range(4):
        needs = RandomNeeds(seed, world_size, 0.7, max_rows=60)
        for formats in (
            [((8, 16), torch.bfloat16)] * 2,
            [((3,), torch.float16), ((), torch.int64), ((5,), torch.bool)],
        ):
            sources = [
                [
                    random_tensor(9 * r + i, (needs.num_rows[r], *shape), dtype)
                    for i, (shape, dtype) in enumerate(formats)
                ]
                for r in range(world_size)
            ]
            mine, table = [x.to(device) for x in sources[rank]], needs.table(rank)
            for lend in (False, True):
                work = native.cast(mine, table, lend=lend)
                for i, got in enumerate(work.wait()):
                    assert torch.equal(got.cpu(), needs.received([of_rank[i] for of_rank in sources], rank))
                work.release()
        compare_reduces(rank, native, needs, device)


def compare_reduces(rank: int, native: NativeCollectives, needs: RandomNeeds, device: torch.device) -> None:
    direct, table = AllToAllCollectives(dist.group.WORLD), needs.table(rank)
    for dtype in (torch.float32, torch.float64):
        partial = random_tensor(rank, (table.num_received, 4, 8), dtype)
        old = random_tensor(rank + 50, (table.num_source, 4, 8), dtype)
        for op in ("sum", "avg"):
            wanted, got = old.clone(), old.clone().to(device)
            if dist.get_backend() == "nccl":
                wanted = wanted.to(device)
            direct.reduce([partial.to(wanted.device)], table, [wanted], op).wait()
            native.reduce([partial.to(device)], table, [got], op).wait()
            torch.testing.assert_close(got.cpu(), wanted.cpu())
    lse, old_lse = (random_tensor(rank + 70 + i, (n, 4), torch.float32) for i, n in enumerate((len(partial), len(old))))
    out, out_lse = old.float().to(device), old_lse.clone().to(device)
    where = device if dist.get_backend() == "nccl" else torch.device("cpu")
    wanted, wanted_lse = old.float().to(where), old_lse.clone().to(where)
    direct.reduce([partial.float().to(where)], table, [wanted], "lse", lse.to(where), wanted_lse).wait()
    native.reduce([partial.float().to(device)], table, [out], "lse", lse.to(device), out_lse).wait()
    torch.testing.assert_close(out.cpu(), wanted.cpu())
    torch.testing.assert_close(out_lse.cpu(), wanted_lse.cpu())


def repeat(rank: int, world_size: int, device_type: str, puts: bool = False) -> None:
    """Exchanges one after another without a host synchronization, with own rows among the received ones."""
    native, table = (
        over_virtual_nodes(rank, PER_NODE, torch.device(device_type), puts),
        fragmented_table(rank, world_size, 7, 3),
    )
    owner = torch.empty(table.num_received, 1, device=device_type)
    for peer, start, stop in table.recv.tolist():
        owner[start:stop] = peer
    larger = RandomNeeds(0, world_size + 1).table(0)
    with pytest.raises(ValueError, match=f"among {world_size + 1} ranks can't run in a group of {world_size}"):
        native.cast([torch.ones(larger.num_source, 8, device=device_type)], larger)
    for turn in range(30):
        rows = torch.full((table.num_source, 8), 10.0 * turn + rank, device=device_type)
        (received,) = native.cast([rows], table).wait()
        assert torch.equal(received, (10.0 * turn + owner).expand_as(received))
        total = torch.zeros_like(rows)
        native.reduce([received], table, [total]).wait()
        assert torch.equal(total, world_size * rows)


def test_the_same_rows_and_sums_as_directly(pool):
    pool.run(compare, "cpu")


def test_exchanges_one_after_another(pool):
    pool.run(repeat, "cpu")


def join_others(rank: int, world_size: int) -> str:
    """Some ranks are in a group more than others."""
    collectives.host = lambda: f"host {rank // PER_NODE}"
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("magi_comm_grpcoll.collectives").addHandler(handler)
    dist.new_group([0, 1])
    native, table = NativeCollectives(dist.group.WORLD), fragmented_table(rank, world_size, 2, 3)
    (received,) = native.cast([torch.ones(table.num_source, 8)], table).wait()
    assert torch.equal(received, torch.ones(table.num_received, 8))
    return "".join(messages)


def test_where_groups_of_hosts_could_not_be_made_all_to_all_is_used():
    with RankPool(4) as pool:
        of_first, *of_others = pool.run(join_others, timeout_s=60)
    assert "replaced by all-to-all: its ranks are in 2, 2, 1, 1 process groups" in of_first
    assert of_others == [""] * 3


ACROSS = pytest.mark.parametrize(
    "puts",
    [
        pytest.param(False, id="alltoall"),
        pytest.param(True, id="puts", marks=pytest.mark.skipif(bool(NO_PUTS), reason=NO_PUTS)),
    ],
)


@pytest.mark.gpu(1)
@ACROSS
def test_the_same_rows_and_sums_on_gpus(gpu_pool, puts):
    gpu_pool.run(compare, "cuda", puts, timeout_s=60)


@pytest.mark.gpu(1)
@ACROSS
def test_exchanges_one_after_another_on_gpus(gpu_pool, puts):
    gpu_pool.run(repeat, "cuda", puts, timeout_s=60)


def be_alone_on_hosts(rank: int, world_size: int) -> None:
    collectives.host = lambda: f"host {rank}"
    native = NativeCollectives(dist.group.WORLD)
    assert isinstance(native.context, GroupContext)
    assert native.context.options.transport == "put"
    assert native.needs_multiprocessors
    compare_reduces(rank, native, RandomNeeds(0, world_size, 0.7, max_rows=60), torch.device("cuda"))


@pytest.mark.gpu(1)
@pytest.mark.skipif(bool(NO_PUTS), reason=NO_PUTS)
def test_ranks_that_are_alone_on_their_hosts_put_at_once():
    with make_pool(2) as pool:
        pool.run(be_alone_on_hosts, timeout_s=60)


def mix_hosts(rank: int, world_size: int) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("magi_comm_grpcoll.collectives").addHandler(handler)
    group = dist.new_group(range(world_size))
    collectives.host = lambda: f"host {rank % 2}"
    assert NativeCollectives(group).context is None
    collectives.host = lambda: f"host {rank}"
    group = dist.new_group(range(world_size))
    assert NativeCollectives(group).context is None
    assert len(lines) == (0 if rank else 2)
    assert rank or "not numbered host by host" in lines[0]
    assert rank or "it needs CUDA GPUs, not cpu" in lines[1]


class Context:
    """Stands for one of those that put."""

    closed = 0

    def __init__(self, group: dist.ProcessGroup, options: object = None) -> None:
        self.needs_multiprocessors = True
        if dist.get_rank() % PER_NODE == 1:
            raise CapacityError("rank 0 can't allocate 4096 bytes to receive rows in: NVSHMEM has no memory left")

    def close(self) -> None:
        Context.closed += 1


def disagree(rank: int, world_size: int) -> None:
    """The ranks of one place can put, those of the other can't."""
    made, collectives.GroupContext = collectives.GroupContext, Context
    try:
        group = dist.new_group(range(world_size))
        inter, _ = subgroups(group, PER_NODE, 30.0)
        assert collectives._make_crossing(group, inter, 30.0) is None
    finally:
        collectives.GroupContext = made
    assert Context.closed == 1 - rank % PER_NODE


def test_if_one_place_cannot_put_none_does(pool):
    pool.run(disagree)


def test_other_orders_of_ranks_go_by_all_to_all(pool):
    pool.run(mix_hosts)


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [("aa", 2), ("aabb", 2), ("abab", 0), ("aab", 0), ("aabbb", 0), ("abcd", 1), ("aabbaa", 0), ("aaabbb", 3)],
)
def test_ranks_of_a_node(hosts, expected):
    assert ranks_per_node([*hosts]) == expected
