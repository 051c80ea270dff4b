# SPDX-License-Identifier: Apache-2.0
"""Plans of all ranks together compute the mask exactly once and move exactly the rows that it needs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention.common.slices import SliceTable
from magi_attention.config import LocalityDispatchAlg, MinHeapDispatchAlg
from magi_attention.plan.build import Plan, Stage, build_plan, build_plans
from magi_attention.plan.demand import find_demand
from magi_attention.plan.dispatch import make_layout
from magi_attention.plan.exchange import ExchangeTable, TwoHopExchange, two_hop_exchange
from magi_attention.plan.key_dispatch import make_key_layout
from magi_attention.plan.layout import Layout
from magi_attention.plan.qo import RowCosts
from magi_attention.plan.relays import two_hop_loads
from magi_attention.plan.stages import StageOptions
from magi_attention.testing.masks import random_masks, rectangular_masks


@st.composite
def layouts(draw, max_tokens=64):
    """A random mask with a random layout over 1, 2, 3, 4 or 8 ranks, ragged at the end or padded."""
    num_real, slices = draw(random_masks(max_tokens))
    return slices, draw(random_layouts(num_real, draw(st.sampled_from([1, 2, 3, 4, 8]))))


@st.composite
def layout_pairs(draw, max_tokens=64):
    """A random mask over two sequences with a layout for each, dealt at random or as the planner does."""
    (num_queries, num_keys), slices = draw(rectangular_masks(max_tokens))
    num_ranks = draw(st.sampled_from([1, 2, 3, 4, 8]))
    layout = draw(random_layouts(num_queries, num_ranks))
    key_layout = draw(random_layouts(num_keys, num_ranks))
    algorithm = draw(st.sampled_from([None, MinHeapDispatchAlg(), LocalityDispatchAlg()]))
    if algorithm is None:
        return slices, layout, key_layout
    is_permutable, key_total, key_chunk = draw(st.booleans()), key_layout.total, key_layout.chunk_size

    def deal_keys(layout: Layout) -> Layout:
        return make_key_layout(
            slices, layout, num_real=num_keys, total=key_total, chunk_size=key_chunk, is_permutable=is_permutable
        )

    if draw(st.booleans()):
        layout = make_layout(
            slices,
            num_real=num_queries,
            total=layout.total,
            chunk_size=layout.chunk_size,
            num_ranks=num_ranks,
            algorithm=algorithm,
            deal_keys=deal_keys,
        )
    return slices, layout, deal_keys(layout)


@st.composite
def random_layouts(draw, num_real, num_ranks):
    chunk_size = draw(st.integers(1, 7))
    total = max(num_real, (num_ranks - 1) * chunk_size + 1) + draw(st.integers(0, 3))
    num_chunks = -(-total // chunk_size)
    spare = draw(st.lists(st.integers(0, num_ranks - 1), min_size=num_chunks, max_size=num_chunks))
    owner = np.array(draw(st.permutations([*range(num_ranks), *spare[num_ranks:]])), np.int64)
    if total == 1 or draw(st.booleans()):
        return Layout(num_real, total, chunk_size, num_ranks, owner)
    inner = draw(st.lists(st.integers(1, total - 1), min_size=num_chunks - 1, max_size=num_chunks - 1, unique=True))
    return Layout(num_real, total, chunk_size, num_ranks, owner, np.array([0, *sorted(inner), total]))


def dense_count(slices: SliceTable, num_rows: int, num_columns: int) -> np.ndarray:
    """How often each (query, key) pair is covered, by the definition of the four types."""
    count = np.zeros((num_rows, num_columns), int)
    for q0, q1, k0, k1, kind in slices.rows.tolist():
        i, j = np.arange(q0, q1)[:, None], np.arange(k0, k1)
        keep = np.ones((q1 - q0, k1 - k0), bool)
        if kind & 1:
            keep &= j <= i + k1 - q1
        if kind & 2:
            keep &= j >= i + k0 - q0
        count[q0:q1, k0:k1] += keep
    return count


def rows_of(ranges: np.ndarray, peer: int) -> np.ndarray:
    return np.concatenate([np.arange(a, b) for p, a, b in ranges.tolist() if p == peer] or [np.empty(0, int)])


def cast(tables: list[ExchangeTable], sources: list[np.ndarray]) -> list[np.ndarray]:
    """Carry out a group cast on arrays, checking that every pair of ranks agrees."""
    received = []
    for me, table in enumerate(tables):
        buffer = np.full(table.num_received, -1)
        assert table.num_source == len(sources[me])
        for peer, other in enumerate(tables):
            place, rows = rows_of(table.recv, peer), rows_of(other.send, me)
            assert len(place) == len(rows)
            assert (buffer[place] == -1).all()
            buffer[place] = sources[peer][rows]
        assert sum(table.recv_counts) == table.num_received
        assert (buffer >= 0).all()
        received.append(buffer)
    return received


def key_buffers(stages: list[Stage], own: list[np.ndarray], per_node: int) -> list[np.ndarray]:
    """The global key rows in every rank's buffer of one stage."""
    exchanges = [stage.exchange for stage in stages]
    if exchanges[0] is None:
        assert all(exchange is None for exchange in exchanges)
        received = [np.empty(0, int) for _ in stages]
    elif isinstance(exchanges[0], TwoHopExchange):
        received = two_hop_cast(exchanges, own, per_node)
    else:
        received = cast(exchanges, own)
    return [
        np.concatenate([rows, got]) if stage.reads_own else got
        for stage, rows, got in zip(stages, own, received, strict=True)
    ]


def two_hop_cast(exchanges: list[TwoHopExchange], own: list[np.ndarray], per_node: int) -> list[np.ndarray]:
    relay: dict[int, np.ndarray] = {}
    for place in range(per_node):
        ranks = range(place, len(own), per_node)
        relay |= zip(ranks, cast([exchanges[r].inter for r in ranks], [own[r] for r in ranks]), strict=True)
    received: list[np.ndarray] = []
    for node in range(len(own) // per_node):
        ranks = range(node * per_node, (node + 1) * per_node)
        sources = [np.concatenate([own[r], relay[r]]) for r in ranks]
        received += cast([exchanges[r].intra for r in ranks], sources)
        for r in ranks:  # what crosses between nodes is needed there, crosses once, and only from other nodes
            assert len(np.unique(relay[r])) == len(relay[r])
            assert not np.isin(relay[r], np.concatenate([own[x] for x in ranks])).any()
        relayed = np.concatenate([relay[r] for r in ranks])
        assert len(np.unique(relayed)) == len(relayed)
        assert np.isin(relayed, np.concatenate(received[-per_node:])).all()
    return received


def add_visits(
    count: np.ndarray, stages: list[Stage], own_queries: list[np.ndarray], own_keys: list[np.ndarray]
) -> None:
    """Count the pairs of a stage whose queries travel."""
    visitors = cast([stage.exchange for stage in stages], own_queries)
    for rank, (stage, queries, keys) in enumerate(zip(stages, visitors, own_keys, strict=True)):
        local = dense_count(stage.slices, len(queries), len(keys))
        assert local.any(axis=1).all(), "a query traveled that reads no key of the rank"
        assert not np.isin(queries, own_queries[rank]).any()
        np.add.at(count, (queries[:, None], keys[None, :]), local)


def positions(layout: Layout) -> list[np.ndarray]:
    own = [layout.positions(rank) for rank in range(layout.num_ranks)]
    assert sorted(np.concatenate(own).tolist()) == list(range(layout.total))
    return own


def check(slices: SliceTable, plans: list[Plan], per_node: int = 1) -> None:
    layout, key_layout = plans[0].layout, plans[0].key_layout
    own, own_keys = positions(layout), positions(key_layout)
    count = np.zeros((layout.total, key_layout.total), int)
    assert len({len(plan.stages) for plan in plans}) == 1
    for stages in zip(*[plan.stages for plan in plans], strict=True):
        if stages[0].queries_travel:
            add_visits(count, list(stages), own, own_keys)
            continue
        for rank, (stage, keys) in enumerate(zip(stages, key_buffers(list(stages), own_keys, per_node), strict=True)):
            local = dense_count(stage.slices, len(own[rank]), len(keys))
            np.add.at(count, (own[rank][:, None], keys[None, :]), local)
            received = keys[len(own_keys[rank]) :] if stage.reads_own else keys
            used = local.any(axis=0)[len(keys) - len(received) :]
            assert used.all(), "a row traveled that no query of the rank reads"
            assert not np.isin(received, own_keys[rank]).any()
    assert (count == dense_count(slices, layout.total, key_layout.total)).all()


@given(layout_pairs())
@settings(max_examples=50)
def test_pairs_and_rows_in_need_are_counted_by_rank(case):
    slices, layout, key_layout = case
    demand = find_demand(slices, layout, key_layout)
    count = dense_count(slices, layout.total, key_layout.total)
    for rank, (queries, keys) in enumerate(zip(positions(layout), positions(key_layout), strict=True)):
        assert demand.area[rank] == count[queries].sum()
        assert demand.area_own[rank] == count[np.ix_(queries, keys)].sum()
        read = np.flatnonzero(count[queries].any(axis=0))
        np.testing.assert_array_equal(rows_of(demand.remote, rank), np.setdiff1d(read, keys))


@given(layouts(), st.sampled_from([0, 1, 2, 4, None]), st.integers(1, 9))
def test_plans_of_all_ranks_fit_together(case, degree, min_piece):
    slices, layout = case
    plans = build_plans(slices, layout, range(layout.num_ranks), StageOptions(degree=degree, min_piece=min_piece))
    check(slices, plans)
    for stages in zip(*[plan.stages for plan in plans], strict=True):
        assert {stage.most_received for stage in stages} == {max(stage.num_received for stage in stages)}
    expected = 1 if degree == 0 else 1 + (8 if degree is None else degree)
    assert len(plans[0].stages) <= expected


@given(layouts(), st.sampled_from([0, 1, 2]))
def test_two_hop_plans_fit_together(case, degree):
    slices, layout = case
    if layout.num_ranks not in (4, 8):
        return
    for per_node in (2, 4):
        shape = (layout.num_ranks // per_node, per_node)
        options = StageOptions(degree=degree, min_piece=2)
        check(slices, build_plans(slices, layout, range(layout.num_ranks), options, shape), per_node)


@given(layouts(), st.sampled_from([1, 2]))
@settings(max_examples=50)
def test_loads_of_two_hops_are_those_of_the_exchanges(case, per_node):
    slices, layout = case
    if layout.num_ranks % per_node:
        per_node = 1
    wanted, ranks = find_demand(slices, layout).remote, range(layout.num_ranks)
    expected = np.zeros((layout.num_ranks, layout.num_ranks), int)
    for rank in ranks:
        node, place = divmod(rank, per_node)
        hops = two_hop_exchange(wanted, layout, rank, (layout.num_ranks // per_node, per_node))
        expected[rank, place::per_node] += hops.inter.recv_counts
        expected[rank, node * per_node : (node + 1) * per_node] += hops.intra.recv_counts
    np.fill_diagonal(expected, 0)  # what a relay keeps does not travel
    loads = two_hop_loads(wanted, layout, per_node)
    np.testing.assert_array_equal(loads.traffic, expected)
    links = loads.by_rank
    np.testing.assert_array_equal(links.received_inter + links.received_intra, expected.sum(axis=1))
    np.testing.assert_array_equal(links.sent_inter + links.sent_intra, expected.sum(axis=0))


@given(layout_pairs(), st.sampled_from([0, 1, 2, None]), st.integers(1, 9))
def test_plans_with_a_layout_for_keys_fit_together(case, degree, min_piece):
    slices, layout, key_layout = case
    options = StageOptions(degree=degree, min_piece=min_piece)
    ranks = range(layout.num_ranks)
    check(slices, build_plans(slices, layout, ranks, options, key_layout=key_layout))
    if layout.num_ranks in (4, 8):
        shape = (layout.num_ranks // 2, 2)
        check(slices, build_plans(slices, layout, ranks, options, shape, key_layout=key_layout), per_node=2)


@given(layout_pairs(), st.sampled_from([RowCosts(1, 1), RowCosts(5, 1), RowCosts(1, 5)]))
def test_plans_in_both_directions_with_a_layout_for_keys_fit_together(case, costs):
    slices, layout, key_layout = case
    check(slices, build_plans(slices, layout, range(layout.num_ranks), row_costs=costs, key_layout=key_layout))


@given(
    layouts(), st.sampled_from([RowCosts(1, 1), RowCosts(5, 1), RowCosts(1, 5), RowCosts(1, 10**6), RowCosts(10**6, 1)])
)
def test_plans_in_both_directions_fit_together(case, costs):
    slices, layout = case
    plans = build_plans(slices, layout, range(layout.num_ranks), row_costs=costs)
    check(slices, plans)
    if layout.num_ranks > 1:
        _, queries, keys = zip(*[plan.stages for plan in plans], strict=True)
        moved = costs.keys * sum(s.num_received for s in keys) + costs.queries * sum(s.num_received for s in queries)
        all_keys = build_plans(slices, layout, range(layout.num_ranks))
        assert moved <= costs.keys * sum(s.num_received for plan in all_keys for s in plan.stages)


def test_few_queries_travel_to_many_keys():
    # Rank 1's eight queries read all keys of rank 0 and rank 0's queries read none of rank 1's.
    slices = SliceTable([[0, 64, 0, 64, 1], [120, 128, 0, 128, 0]])
    layout = Layout(128, 128, 64, 2, np.array([0, 1]))
    plans = build_plans(slices, layout, range(2), row_costs=RowCosts.of_heads(8, 8, 128))
    check(slices, plans)
    assert [plan.stages[1].num_received for plan in plans] == [8, 0]
    assert [plan.stages[2].num_received for plan in plans] == [0, 0]


@given(layouts())
@settings(max_examples=20)
def test_each_rank_plans_alone_and_equally(case):
    slices, layout = case
    together = build_plans(slices, layout, range(layout.num_ranks))
    for rank, expected in enumerate(together):
        alone = build_plan(slices, layout, rank)
        assert alone.digest == expected.digest
        for mine, theirs in zip(alone.stages, expected.stages, strict=True):
            assert mine.slices == theirs.slices
            assert mine.num_received == theirs.num_received


def causal(total: int) -> SliceTable:
    return SliceTable([[0, total, 0, total, 1]])


def two_ranks(total: int, chunk_size: int) -> Layout:
    owner = np.array([0, 1, 1, 0] * (total // chunk_size // 4))
    return Layout(total, total, chunk_size, 2, owner)


@pytest.mark.parametrize("change", ["mask", "layout", "key layout", "options"])
def test_digest_tells_different_plans_apart(change):
    base = build_plan(causal(32), two_ranks(32, 8), 0)
    if change == "mask":
        other = build_plan(causal(31), two_ranks(32, 8), 0)
    elif change == "layout":
        other = build_plan(causal(32), two_ranks(32, 4), 0)
    elif change == "key layout":
        other = build_plan(causal(32), two_ranks(32, 8), 0, key_layout=two_ranks(32, 4))
    else:
        other = build_plan(causal(32), two_ranks(32, 8), 0, StageOptions(degree=2))
    assert base.digest != other.digest
    assert base.digest == build_plan(causal(32), two_ranks(32, 8), 1).digest


def test_stages_are_of_nearly_equal_length():
    plan = build_plan(causal(4096), two_ranks(4096, 64), 0, StageOptions(degree=4, min_piece=64))
    received = [stage.num_received for stage in plan.stages[1:]]
    assert len(received) == 4
    assert max(received) - min(received) <= 64


def test_pieces_smaller_than_the_minimum_stay_together():
    plan = build_plan(causal(4096), two_ranks(4096, 64), 0, StageOptions(degree=4, min_piece=4096))
    assert len(plan.stages) == 2


def test_automatic_degree_hides_slow_travel_behind_computation():
    def degree(seconds_per_row):
        options = StageOptions(degree=None, min_piece=1, seconds_per_row=seconds_per_row)
        return len(build_plan(causal(4096), two_ranks(4096, 64), 0, options).stages) - 1

    assert degree(0.0) == 1
    assert degree(2000.0) > 1


def test_keys_that_become_neighbors_are_one_slice():
    # Rank 0 owns chunks 0 and 3 of a full mask: the rows it receives, of chunks 1 and 2, are one run to its kernels.
    plan = build_plan(SliceTable([[0, 32, 0, 32, 0]]), two_ranks(32, 8), 0)
    assert plan.stages[1].slices.rows.tolist() == [[0, 8, 0, 16, 0], [8, 16, 0, 16, 0]]


def key_layout_of(slices, layout, total, chunk_size, is_permutable=True):
    return make_key_layout(
        slices, layout, num_real=total, total=total, chunk_size=chunk_size, is_permutable=is_permutable
    )


@given(layout_pairs())
def test_permuted_keys_travel_no_more_than_contiguous_ones(case):
    slices, layout, key_layout = case
    num_chunks, num_ranks = len(key_layout.owner), layout.num_ranks
    moved = []
    for is_permutable in (False, True):
        keys = key_layout_of(slices, layout, key_layout.total, key_layout.chunk_size, is_permutable)
        counts = np.bincount(keys.owner, minlength=num_ranks)
        assert sorted(counts) == sorted(num_chunks // num_ranks + (np.arange(num_ranks) < num_chunks % num_ranks))
        assert is_permutable or (np.diff(keys.owner) >= 0).all()
        remote = find_demand(slices, layout, keys).remote
        moved.append((remote[:, 2] - remote[:, 1]).sum())
    assert moved[1] <= moved[0]


@pytest.mark.parametrize("kind", [0, 1], ids=["full", "causal"])
def test_keys_that_several_ranks_read_lie_at_one_of_them(kind):
    # Four documents, in another order than their keys; the queries of each are spread over two of eight ranks.
    place = [2, 0, 3, 1]
    slices = SliceTable([[64 * n, 64 * n + 64, 128 * place[n], 128 * place[n] + 128, kind] for n in range(4)])
    layout = Layout(256, 256, 8, 8, np.repeat([0, 2, 4, 6], 8) + np.arange(32) % 2)
    keys = key_layout_of(slices, layout, 512, 8)
    assert (np.bincount(keys.owner) == 8).all()
    assert [sorted({*keys.owner[16 * place[n] : 16 * place[n] + 16]}) for n in range(4)] == [
        [2 * n, 2 * n + 1] for n in range(4)
    ]


def test_keys_lie_where_they_are_read():
    # Four documents; rank 0 has the queries of the second and the last, rank 1 the others: so with the keys.
    slices = SliceTable([[8 * n, 8 * n + 8, 4 * n, 4 * n + 4, 0] for n in range(4)])
    layout = Layout(32, 32, 8, 2, np.array([1, 0, 1, 0]))
    keys = key_layout_of(slices, layout, 16, 4)
    assert keys.owner.tolist() == [1, 0, 1, 0]
    assert [plan.stages[0].slices.area() for plan in build_plans(slices, layout, range(2), key_layout=keys)] == [64, 64]
    assert key_layout_of(slices, layout, 16, 4, is_permutable=False).owner.tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="fewer than the 2 ranks"):
        key_layout_of(slices, layout, 16, 16)
