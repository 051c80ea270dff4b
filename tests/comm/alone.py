# SPDX-License-Identifier: Apache-2.0
"""The kernels on one GPU that plays all ranks: ``python -m tests.comm.alone``, also under compute-sanitizer."""

from types import SimpleNamespace

import numpy as np
import torch

from magi_attention.comm.packing import row_formats
from magi_attention.comm.routes import routes_of
from magi_comm_grpcoll.combine import _NAMES, Combination, Segments, can_combine
from magi_comm_grpcoll.plans import make_plans
from magi_comm_grpcoll.routes import PushRoute
from tests.distributed.exchanges import RandomNeeds, random_tensor

NUM_RANKS = 3
# Rows for bulk copies, and for words of every size.
SHAPES = [(8, 128), (4,), (2,), (1,), (5, 3)]


def memory(num_bytes: int) -> SimpleNamespace:
    """As many bytes for every rank, all of them here."""
    parts = [torch.zeros(num_bytes, dtype=torch.uint8, device="cuda") for _ in range(NUM_RANKS)]
    addresses = np.array([part.data_ptr() for part in parts])
    return SimpleNamespace(
        parts=parts, local=parts[0], addresses=addresses, device_addresses=torch.from_numpy(addresses).cuda()
    )


def push(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Every rank's push, one after another; then all slots and flags are looked at."""
    needs = RandomNeeds(seed, NUM_RANKS, 0.7, max_rows=60)
    tables = [needs.table(rank) for rank in range(NUM_RANKS)]
    sources = [random_tensor(rank, (table.num_source, *shape), dtype).cuda() for rank, table in enumerate(tables)]
    plans = [make_plans("cast", tables, row_formats([x, x]), rank)[0] for rank, x in enumerate(sources)]
    slot_bytes = max(plan.slot_bytes for plan in plans)
    arena = SimpleNamespace(memory=memory(2 * slot_bytes), slot_bytes=slot_bytes, num_slots=2)
    control = memory(8 * NUM_RANKS)
    for rank, (plan, source) in enumerate(zip(plans, sources, strict=True)):
        wires = SimpleNamespace(send=torch.cuda.current_stream(), flag_offset=8 * rank)
        route = PushRoute(plan.copies, arena, wires, control)
        for _ in range(2):  # the counter of blocks is ready again
            route.send([source.data_ptr()] * 2, 1, 6 + rank)
    torch.cuda.synchronize()
    for rank, plan in enumerate(plans):
        expected = needs.received([x.cpu() for x in sources], rank).contiguous().view(torch.uint8).flatten()
        for start in plan.layout.starts[rank].tolist():
            first = slot_bytes + start
            assert torch.equal(arena.memory.parts[rank][first : first + len(expected)].cpu(), expected), (seed, shape)
        assert control.parts[rank].view(torch.int64).tolist() == [7, 8, 9]


def reduce(seed: int, partial_dtype: torch.dtype, dtype: torch.dtype, dim: int) -> None:
    """Sum, average and merge by lse, against float64."""
    table = RandomNeeds(seed, NUM_RANKS, 0.8, max_rows=40).table(0)
    segments, rows = Segments(*routes_of(table, torch.device("cuda", 0)).segments), sum(table.send_counts)
    slots = random_tensor(1, (rows, 4, dim), partial_dtype).cuda()
    old = random_tensor(2, (table.num_source, 4, dim), dtype).cuda()
    sent = torch.tensor(
        [row for _, start, stop in table.send.tolist() for row in range(start, stop)], dtype=torch.int64
    )
    total = old.double().cpu().index_add(0, sent, slots.double().cpu())
    terms = 1 + torch.bincount(sent, minlength=table.num_source)
    stream = torch.cuda.current_stream()
    for op, expected in (("sum", total), ("avg", total / terms[:, None, None])):
        got = old.clone()
        Combination(stream, op, [got], [slots.dtype], segments).enqueue([got.data_ptr()], [slots.data_ptr()])
        torch.testing.assert_close(got.cpu(), expected.to(dtype))
    lse, old_lse = (random_tensor(3 + i, (n, 4), torch.float32).cuda() for i, n in enumerate((rows, table.num_source)))
    got, got_lse = old.clone(), old_lse.clone()
    merge = Combination(stream, "lse", [got, got_lse], [slots.dtype, lse.dtype], segments)
    merge.enqueue([x.data_ptr() for x in (got, got_lse, old_lse)], [slots.data_ptr(), lse.data_ptr()])
    weights, old_weights = lse.double().cpu().exp(), old_lse.double().cpu().exp()
    mass = old_weights.index_add(0, sent, weights)
    weighted = (old.double().cpu() * old_weights[..., None]).index_add(
        0, sent, slots.double().cpu() * weights[..., None]
    )
    torch.testing.assert_close(got.cpu(), (weighted / mass[..., None]).to(dtype))
    torch.testing.assert_close(got_lse.cpu(), mass.log().float())


def main() -> None:
    torch.cuda.set_device(0)
    for seed in range(2):
        for shape in SHAPES:
            for dtype in (torch.bfloat16, torch.uint8):
                push(seed, shape, dtype)
        for partial in _NAMES:
            for into in _NAMES:
                if can_combine(partial, into):
                    for dim in (64, 5):
                        reduce(seed, partial, into, dim)
    print("all kernels are right")


if __name__ == "__main__":
    main()
