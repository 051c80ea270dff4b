# SPDX-License-Identifier: Apache-2.0
"""Group cast and group reduce, in one hop and in two, against sums over all ranks' rows."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from magi_attention.comm import AllToAllCollectives, HierarchicalCollectives, make_collectives
from magi_attention.comm.routes import Places, places_of
from magi_attention.config import DistAttnConfig, RuntimeConfig
from magi_attention.plan.exchange import ExchangeTable
from magi_attention.testing.distributed import RankPool
from tests.distributed.exchanges import RandomNeeds, random_tensor, single_rows, two_hop

# Row shapes whose bytes fill 8-byte words and others that don't, in every dtype that may travel.
MIXED = [
    ((2, 4), torch.bfloat16),
    ((3,), torch.float16),
    ((), torch.float32),
    ((5, 1), torch.float64),
    ((2,), torch.int64),
    ((2,), torch.complex128),
    ((3, 3), torch.bool),
    ((7,), torch.bfloat16),
    ((3,), torch.float8_e4m3fn),
    ((), torch.uint16),
]
ALONE = [[spec] for spec in MIXED[:4]]


@pytest.fixture(scope="module", params=["gloo-4", pytest.param("nccl-2", marks=pytest.mark.gpu(2))])
def pool(request):
    backend, size = request.param.split("-")
    with RankPool(int(size), backend) as pool:
        yield pool


def device_of_backend() -> torch.device:
    if "nccl" in dist.get_backend():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def make_case(rank: int, world_size: int, seed: int, hops: int, share: float):
    """The collectives, the needs and this rank's table, for one hop or for two over two nodes."""
    needs = RandomNeeds(seed, world_size, share)
    if hops == 1:
        return AllToAllCollectives(dist.group.WORLD), needs, needs.table(rank)
    mesh = dist.init_device_mesh(device_of_backend().type, (2, world_size // 2), mesh_dim_names=("inter", "intra"))
    config = DistAttnConfig(runtime_config=RuntimeConfig(hierarchical_comm=True))
    collectives = make_collectives(dist.group.WORLD, mesh, config)
    assert isinstance(collectives, HierarchicalCollectives)
    return collectives, needs, two_hop(needs, rank, world_size // 2)


def is_equal(x: torch.Tensor, y: torch.Tensor) -> bool:
    return torch.equal(x.double(), y.double())  # which PyTorch compares for every dtype


def cast_cases(rank: int, world_size: int, seeds: range, hops: int, share: float) -> None:
    device = device_of_backend()
    for seed in seeds:
        collectives, needs, table = make_case(rank, world_size, seed, hops, share)
        for specs in [MIXED, *ALONE]:
            sources = [
                [
                    random_tensor(97 * r + i, (needs.num_rows[r], *shape), dtype)
                    for i, (shape, dtype) in enumerate(specs)
                ]
                for r in range(world_size)
            ]
            mine = [source.to(device) for source in sources[rank]]
            work = collectives.cast(mine, table)
            received = work.wait()
            assert work.wait() is received
            given = [x.new_empty(x.shape) for x in received]
            collectives.cast(mine, table, out=given).wait()
            for i, actual in enumerate(received):
                assert is_equal(given[i], actual)
                assert actual[:1].is_contiguous()
                assert actual.dtype == mine[i].dtype
                expected = needs.received([of_rank[i] for of_rank in sources], rank)
                assert is_equal(actual.cpu(), expected), (seed, specs[i])
                assert is_equal(mine[i].cpu(), sources[rank][i])


@pytest.mark.parametrize("share", [0.5, 0.1, 0.0])
def test_cast(pool, share):
    pool.run(cast_cases, range(4), 1, share)


def test_cast_in_two_hops(pool):
    pool.run(cast_cases, range(4), 2, 0.5)


def reduce_cases(rank: int, world_size: int, seeds: range, hops: int, op: str) -> None:
    device = device_of_backend()
    # (dtype of what travels, dtype of what it is added to, tolerance against float64)
    kinds = [
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 1e-5 if hops == 1 else 2e-2),
        (torch.bfloat16, torch.bfloat16, 2e-2),
        (torch.float64, torch.float64, 1e-12),
    ]
    for seed in seeds:
        collectives, needs, table = make_case(rank, world_size, seed, hops, 0.5)
        shapes = [(3, 2), (5,), (), (8, 16)]  # of the last one's rows, all of a tensor may lie together
        shape = shapes[seed % 4]
        tensors = [
            [random_tensor(31 * r + i, (len(needs.needs[r]), *shape), kind[0]) for i, kind in enumerate(kinds)]
            for r in range(world_size)
        ]
        old = [random_tensor(i, (needs.num_rows[rank], *shape), kind[1]) for i, kind in enumerate(kinds)]
        first, again = ([t.clone().to(device) for t in old] for _ in range(2))
        partials = [t.to(device) for t in tensors[rank]]
        works = [collectives.reduce(partials, table, into, op) for into in (first, again)]  # both are under way
        for work in works:
            assert work.wait() is None
        works[0].wait()  # adds nothing more
        for i, (_, _, tolerance) in enumerate(kinds):
            expected = old[i].double()
            for row in range(needs.num_rows[rank]):
                terms = [tensors[r][i][at].double() for r, at in needs.partials_of(rank, row)]
                expected[row] = sum(terms, expected[row]) / (1 + len(terms) if op == "avg" else 1)
            torch.testing.assert_close(first[i].cpu().double(), expected, atol=tolerance, rtol=tolerance)
            assert torch.equal(first[i], again[i])


@pytest.mark.parametrize("op", ["sum", "avg"])
def test_reduce(pool, op):
    pool.run(reduce_cases, range(8), 1, op)


@pytest.mark.parametrize("op", ["sum", "avg"])
def test_reduce_in_two_hops(pool, op):
    pool.run(reduce_cases, range(3), 2, op)


def sum_rounded_once(rank: int, world_size: int, hops: int) -> None:
    """Numbers of which bfloat16 loses a 1 if it rounds after each addition."""
    collectives, needs, _ = make_case(rank, world_size, 0, hops, 0.5)
    needs.num_rows = np.array([1] + [0] * (world_size - 1))
    needs.needs = [np.zeros((0, 2), int)] + [np.zeros((1, 2), int)] * (world_size - 1)
    table = needs.table(rank) if hops == 1 else two_hop(needs, rank, world_size // 2)
    total, *terms = [256.0, 1, 1, 0] if hops == 1 else [1.0, 1, 256, 0]
    into = torch.full((needs.num_rows[rank], 4), total, dtype=torch.bfloat16, device=device_of_backend())
    partial = into.new_full((len(needs.needs[rank]), 4), ([0.0, *terms])[rank])
    collectives.reduce([partial], table, [into]).wait()
    assert into.flatten().tolist() == [258.0] * into.numel()


@pytest.mark.parametrize("hops", [1, 2])
@pytest.mark.parametrize("pool", ["gloo-4"], indirect=True)
def test_sums_of_low_precision_are_rounded_once(pool, hops):
    pool.run(sum_rounded_once, hops)


def reduce_onto_own_rows(rank: int, world_size: int, seeds: range, hops: int, op: str) -> None:
    device = device_of_backend()
    for seed in seeds:
        collectives, needs, table = make_case(rank, world_size, seed, hops, 0.9)
        num_rows, num_received = int(needs.num_rows[rank]), len(needs.needs[rank])
        choose, shape = torch.Generator().manual_seed(seed), (8, 16) if seed % 2 else (3, 4)
        if num_received < num_rows:  # there are always as many calls, on all ranks
            some = torch.randint(0, max(num_received, 1), (num_rows if num_received else 0,), generator=choose)
            places = [single_rows(some)] * 2
        else:
            some = torch.randperm(num_received, generator=choose)[:num_rows]
            places = [single_rows(some), np.array([[0, num_rows]])]
        for into_dtype in (torch.bfloat16, torch.float32):
            partials = [
                random_tensor(31 * rank + i, (num_received, *shape), torch.bfloat16).to(device) for i in range(2)
            ]
            for chosen in places:
                own_places: Places | None = places_of(chosen, device)
                expected = [x[own_places.rows].to(into_dtype) for x in partials]
                if not num_received:
                    own_places, expected = None, [torch.ones(num_rows, *shape, dtype=into_dtype, device=device)] * 2
                into = [torch.full_like(x, torch.nan) if num_received else x.clone() for x in expected]
                expected = [x.clone() for x in expected]
                collectives.reduce(partials, table, expected, op).wait()
                collectives.reduce(partials, table, into, op, own_places=own_places).wait()
                assert all(torch.equal(x, y) for x, y in zip(into, expected, strict=True))


@pytest.mark.parametrize("op", ["sum", "avg"])
@pytest.mark.parametrize("hops", [1, 2])
def test_own_rows_are_taken_while_others_travel(pool, hops, op):
    pool.run(reduce_onto_own_rows, range(4), hops, op)


def reduce_lse_cases(rank: int, world_size: int, seeds: range, hops: int) -> None:
    device = device_of_backend()
    for seed in seeds:
        collectives, needs, table = make_case(rank, world_size, seed, hops, 0.5)
        for dtype, tolerance in [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float64, 1e-12)]:
            lse_dtype = torch.promote_types(dtype, torch.float32)
            outs, lses = [], []
            for r in range(world_size):
                n = len(needs.needs[r])
                outs.append(random_tensor(7 * r, (n, 3, 4), dtype))
                lses.append(10 * random_tensor(7 * r + 1, (n, 3), lse_dtype))
                hidden = random_tensor(7 * r + 2, (n, 3), torch.bool)  # partials without keys, whatever they hold
                outs[r][hidden], lses[r][hidden] = torch.nan, -torch.inf
            n = needs.num_rows[rank]
            old, old_lse = random_tensor(5, (n, 3, 4), dtype), 10 * random_tensor(6, (n, 3), lse_dtype)
            has_keys = torch.arange(n) % 2 > 0
            is_sent = torch.tensor([bool(needs.partials_of(rank, row)) for row in range(n)], dtype=torch.bool)
            old[~has_keys], old_lse[~has_keys] = 0, -torch.inf
            old[~has_keys & is_sent] = torch.nan  # which is overwritten
            out, lse = old.to(device, copy=True), old_lse.to(device, copy=True)
            partial, partial_lse = outs[rank].to(device), lses[rank].to(device)
            collectives.reduce([partial], table, [out], "lse", partial_lse, lse).wait()

            expected, expected_lse = torch.zeros(n, 3, 4, dtype=torch.float64), torch.zeros(n, 3, dtype=torch.float64)
            for row in range(n):
                at = needs.partials_of(rank, row)
                values = torch.stack([old[row], *(outs[r][i] for r, i in at)]).double().nan_to_num()
                weights = torch.stack([old_lse[row], *(lses[r][i] for r, i in at)]).double()
                expected_lse[row] = weights.logsumexp(0)
                expected[row] = (weights.softmax(0).nan_to_num()[..., None] * values).sum(0)
            torch.testing.assert_close(out.cpu().double(), expected, atol=tolerance, rtol=tolerance)
            torch.testing.assert_close(lse.cpu().double(), expected_lse, atol=1e-5, rtol=1e-5)


def test_reduce_by_lse(pool):
    pool.run(reduce_lse_cases, range(4), 1)


def test_reduce_by_lse_in_two_hops(pool):
    pool.run(reduce_lse_cases, range(3), 2)


def sum_of_integers(rank: int, world_size: int, hops: int) -> None:
    collectives, needs, table = make_case(rank, world_size, 0, hops, 0.5)
    term = 2**24 + 1  # which float32 does not have
    total = torch.zeros(needs.num_rows[rank], 2, dtype=torch.int64, device=device_of_backend())
    collectives.reduce([total.new_full((len(needs.needs[rank]), 2), term)], table, [total]).wait()
    counts = [len(needs.partials_of(rank, row)) for row in range(needs.num_rows[rank])]
    assert total[:, 1].tolist() == [term * count for count in counts]


@pytest.mark.parametrize("hops", [1, 2])
def test_integers_are_summed_exactly(pool, hops):
    pool.run(sum_of_integers, hops)


def exchanges_under_way(rank: int, world_size: int) -> None:
    device = device_of_backend()
    cases = [RandomNeeds(seed, world_size) for seed in range(3)]
    collectives = AllToAllCollectives(dist.group.WORLD)
    sources = [
        [random_tensor(r + seed, (n, 8), torch.float32) for r, n in enumerate(case.num_rows)]
        for seed, case in enumerate(cases)
    ]
    works = [
        collectives.cast([source[rank].to(device)], case.table(rank))
        for source, case in zip(sources, cases, strict=True)
    ]
    for work, source, case in reversed(list(zip(works, sources, cases, strict=True))):
        assert torch.equal(work.wait()[0].cpu(), case.received(source, rank))


def test_several_exchanges_at_once_are_kept_apart(pool):
    pool.run(exchanges_under_way)


def views_as_sources(rank: int, world_size: int) -> None:
    """Contiguous runs are sent without a copy; transposed and misaligned tensors must travel all the same."""
    n = 6
    first = n * rank // world_size
    ranges = np.array([(peer, first, first + 2) for peer in range(world_size)], np.int64)
    arrivals = np.array([(peer, 2 * peer, 2 * peer + 2) for peer in range(world_size)], np.int64)
    table = ExchangeTable(ranges, arrivals, world_size, n, 2 * world_size)
    base = torch.arange(n * 8 + 1, dtype=torch.float32, device=device_of_backend())
    transposed = base[:-1].view(8, n).t()
    misaligned = base[1:].view(n, 8)
    collectives = AllToAllCollectives(dist.group.WORLD)
    for source in (transposed, misaligned, misaligned.contiguous()[:, :2]):
        (received,) = collectives.cast([source], table).wait()
        starts = [n * peer // world_size for peer in range(world_size)]
        assert torch.equal(received, torch.cat([source[start : start + 2] for start in starts]))


def test_views_can_be_sent(pool):
    pool.run(views_as_sources)


def cast_into_given_rows(rank: int, world_size: int, hops: int) -> None:
    device = device_of_backend()
    for seed in range(3):
        collectives, needs, table = make_case(rank, world_size, seed, hops, 0.5)
        sources = [random_tensor(r, (n, 5), torch.bfloat16) for r, n in enumerate(needs.num_rows)]
        whole = torch.zeros(2 + len(needs.needs[rank]), 5, dtype=torch.bfloat16, device=device)
        (received,) = collectives.cast([sources[rank].to(device)], table, out=[whole[2:]]).wait()
        assert received.data_ptr() == whole[2:].data_ptr()
        assert torch.equal(whole[2:].cpu(), needs.received(sources, rank))
        assert not whole[:2].any()
        for wrong in ([whole], [whole[2:].float()], [whole[2:], whole[2:]]):
            with pytest.raises(ValueError, match=r"out must hold|can't be received in 2"):
                collectives.cast([sources[rank].to(device)], table, out=wrong)


@pytest.mark.parametrize("hops", [1, 2])
def test_rows_can_be_received_in_given_tensors(pool, hops):
    pool.run(cast_into_given_rows, hops)
