# SPDX-License-Identifier: Apache-2.0
"""What the ranks settle on the host, on processes without a GPU."""

import logging
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed import _symmetric_memory
from torch.distributed.distributed_c10d import _get_default_store
from torch.testing._internal.distributed.fake_pg import FakeStore

from magi_attention.comm import AllToAllCollectives
from magi_attention.comm.packing import row_formats
from magi_attention.testing.distributed import RankPool
from magi_comm_grpcoll import (
    CapacityError,
    GroupContext,
    NativeCollectives,
    NotNativeError,
    PlanMismatchError,
    collectives,
    heap,
)
from magi_comm_grpcoll.arena import MappedAllocator
from magi_comm_grpcoll.capability import reason_against
from magi_comm_grpcoll.handshake import Handshake
from magi_comm_grpcoll.heap import Heap
from magi_comm_grpcoll.plans import gather_plans
from tests.distributed.exchanges import RandomNeeds, random_tensor


@pytest.fixture(scope="module")
def pool():
    with RankPool(3) as pool:
        yield pool


def talk(rank: int, world_size: int) -> None:
    first, second = (Handshake(dist.group.WORLD, 30) for _ in range(2))
    for turn in range(5):
        for handshake, word in ((first, b"\x00first"), (second, b"\xffsecond")):
            expected = [word + bytes([turn, member]) for member in range(world_size)]
            assert handshake.exchange(expected[rank]) == expected


def test_every_rank_sees_what_all_say(pool):
    pool.run(talk)


def talk_long(rank: int, world_size: int) -> int:
    """Messages longer than a store of torch takes at a time, as tables of many ranges are; returns the keys kept."""
    talking, before = Handshake(dist.group.WORLD, 30), _get_default_store().num_keys()
    for turn in range(3):
        expected = [bytes([turn, member]) * (9 << 19) * member for member in range(world_size)]
        assert talking.exchange(expected[rank]) == expected
    talking.exchange(b"")
    dist.barrier()
    return _get_default_store().num_keys() - before


def test_messages_may_be_long(pool):
    assert max(pool.run(talk_long)) < 8  # none of a message but the last


def initialize_again(rank: int, world_size: int, folder: str) -> None:
    """Of groups of other ranks, but with the same name."""
    for number, ranks in enumerate(([0, 1], [1, 2], [0, 1])):
        dist.destroy_process_group()
        dist.init_process_group("gloo", init_method=f"file://{folder}/{number}", rank=rank, world_size=world_size)
        group = dist.new_group(ranks)
        if rank in ranks:
            assert Handshake(group, 5).exchange(bytes([rank])) == [bytes([member]) for member in ranks]
        dist.barrier()


def test_groups_with_a_name_that_other_ranks_had(tmp_path):
    with RankPool(3) as pool:
        pool.run(initialize_again, str(tmp_path))


def stay_away(rank: int, world_size: int) -> None:
    handshake = Handshake(dist.group.WORLD, 1.0)
    if rank == 1:
        return
    with pytest.raises(RuntimeError, match=r"ranks \[1\] of the group \[0, 1, 2\] did not come .* within 1 s"):
        handshake.exchange(b"here")


def test_a_rank_that_does_not_come_is_named(pool):
    pool.run(stay_away)


def leave(rank: int, world_size: int) -> None:
    """NVSHMEM stops on all ranks or on none, whenever each of them exits."""
    of_rank, asked = Heap(range(world_size), torch.device("cpu")), Handshake(dist.group.WORLD, 30)
    for late_s, stops in ((0.0, True), (1.5, False)):
        farewell, stopped = Handshake(dist.group.WORLD, 0.5 if late_s else 30), []
        bindings = SimpleNamespace(hostlib_finalize=lambda stopped=stopped: stopped.append(True))
        asked.exchange(b"start")
        if rank == 1:
            time.sleep(late_s)  # and then finds the messages of all who have gone
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(heap, "_bindings", lambda bindings=bindings: bindings)
            heap._leave(of_rank, farewell)
        assert [bool(answer[0]) for answer in asked.exchange(bytes([len(stopped)]))] == [stops] * world_size


def test_a_rank_that_exits_late_stops_nothing_alone(pool):
    pool.run(leave)


def gather_all(rank: int, world_size: int) -> None:
    handshake, needs = Handshake(dist.group.WORLD, 30), RandomNeeds(5, world_size, 0.5)
    formats = row_formats([torch.zeros(1, 4, 8)])
    (plan,) = gather_plans(handshake, "cast", needs.table(rank), formats, rank)
    assert plan.layout.sizes.tolist() == [-(-len(needed) * 128 // 256) * 256 for needed in needs.needs]
    assert plan.copies.size.sum() == 128 * needs.table(rank).send_counts[0] + sum(
        128 * count for count in needs.table(rank).send_counts[1:]
    )
    with pytest.raises(
        PlanMismatchError, match=r"ranks \[2\] .* than rank 0: a reduce of rows \(4, 8\) torch.float32 on"
    ):
        gather_plans(handshake, "reduce" if rank == 2 else "cast", needs.table(rank), formats, rank)
    other = RandomNeeds(6, world_size, 0.9)
    with pytest.raises(PlanMismatchError, match=r"rank \d sends \d+ rows to rank \d, which expects"):
        gather_plans(handshake, "cast", (needs if rank else other).table(rank), formats, rank)
    parts = gather_plans(handshake, "cast", needs.table(rank), formats, rank, most_bytes=512)
    assert len(parts) > 1
    assert all(part.slot_bytes <= 512 for part in parts)
    with pytest.raises(CapacityError, match=r"needs slots of 256 bytes even in .* rounds, but 100 is the most"):
        gather_plans(handshake, "cast", needs.table(rank), formats, rank, most_bytes=100)
    gather_plans(handshake, "cast", needs.table(rank), formats, rank)  # and the group is still good


def test_plans_are_gathered_and_compared(pool):
    pool.run(gather_all)


def fall_back(rank: int, world_size: int) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("magi_comm_grpcoll.collectives").addHandler(handler)
    with pytest.raises(NotNativeError, match="on rank 0 it needs CUDA GPUs, not cpu"):
        GroupContext(dist.group.WORLD)
    native, again = (NativeCollectives(dist.group.WORLD) for _ in range(2))
    assert native.context is None
    assert again.context is None
    assert lines == (
        []
        if rank
        else [
            f"the native group collectives are replaced by all-to-all: on rank 0 {reason_against(torch.device('cpu'))}"
        ]
    )
    needs = RandomNeeds(3, world_size, 0.5)
    rows = random_tensor(rank, (int(needs.num_rows[rank]), 4), torch.float32)
    work = native.cast([rows], needs.table(rank), lend=True)
    (expected,) = AllToAllCollectives(dist.group.WORLD).cast([rows], needs.table(rank)).wait()
    assert torch.equal(work.wait()[0], expected)
    work.release()
    total = torch.zeros_like(rows)
    native.reduce([expected], needs.table(rank), [total]).wait()
    casts = torch.tensor([len(needs.partials_of(rank, row)) for row in range(len(rows))])
    torch.testing.assert_close(total, rows * casts[:, None])


def test_without_gpus_all_ranks_go_by_all_to_all_and_one_says_why(pool):
    if torch.cuda.is_available():
        pytest.skip("there are GPUs")
    pool.run(fall_back)


def forget(rank: int, world_size: int, folder: str) -> tuple[int, int]:
    """How many groups have contexts, before and after torch was initialized anew."""
    for name in ("WORLD", "pair"):
        NativeCollectives(dist.group.WORLD if name == "WORLD" else dist.new_group([0, 1], group_desc=name))
    before = len(collectives._contexts)
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{folder}/again", rank=rank, world_size=world_size)
    NativeCollectives(dist.group.WORLD)
    return before, len(collectives._contexts)


def test_contexts_of_destroyed_groups_are_forgotten(tmp_path):
    with RankPool(2) as pool:
        assert pool.run(forget, str(tmp_path)) == [(2, 1)] * 2


def map_in_vain(rank: int, world_size: int) -> None:
    """The memory of other ranks can't be mapped on one of them."""

    def rendezvous(memory: torch.Tensor, group: dist.ProcessGroup) -> SimpleNamespace:
        if rank == 1:
            raise RuntimeError("CUDA driver error: invalid device ordinal\nwhere it happened")
        return SimpleNamespace(buffer_ptrs=[memory.data_ptr()] * world_size)

    allocator = MappedAllocator(torch.device("cpu"), dist.group.WORLD, Handshake(dist.group.WORLD, 10))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_symmetric_memory, "empty", lambda num_bytes, dtype, device: torch.empty(num_bytes, dtype=dtype))
        patch.setattr(_symmetric_memory, "rendezvous", rendezvous)
        with pytest.raises(NotNativeError, match=r"on rank 1 memory .* can't be mapped: .* invalid device ordinal$"):
            allocator.allocate(64)


def test_where_memory_can_not_be_mapped_all_ranks_hear_of_it(pool):
    pool.run(map_in_vain)


def run_dry(rank: int, world_size: int) -> str:
    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=2, world_size=8)
    native = NativeCollectives(dist.group.WORLD)
    needs = RandomNeeds(3, 8, 0.5)
    (received,) = native.cast([torch.zeros(int(needs.num_rows[2]), 4)], needs.table(2)).wait()
    assert received.shape == (len(needs.needs[2]), 4)
    return repr(native.context)


def test_a_rank_of_a_fake_group_asks_nobody():
    with RankPool(1) as pool:
        assert pool.run(run_dry) == ["None"]
