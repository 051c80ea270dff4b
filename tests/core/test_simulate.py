# SPDX-License-Identifier: Apache-2.0
"""What every rank does in every stage, measured for all ranks at once, and the time predicted from it."""

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention.common import bands as band
from magi_attention.common.bands import UNBOUNDED
from magi_attention.common.slices import SliceTable
from magi_attention.plan import stage_work
from magi_attention.plan.build import build_plans
from magi_attention.plan.demand import find_demand
from magi_attention.plan.layout import Layout
from magi_attention.plan.measure_plans import work_of_plans
from magi_attention.plan.qo import RowCosts
from magi_attention.plan.rates import MERGE_BYTES, TILE, Cluster, LayerShape
from magi_attention.plan.simulate import predict
from magi_attention.plan.stage_work import count_tiles, measure_stages, real_tokens
from magi_attention.plan.stages import StageOptions, cut_stages
from magi_attention.testing.masks import random_masks, rectangular_masks

SHAPE = LayerShape()
FAST = Cluster(exchange_latency_us=0, kernel_latency_us=0, memory_gbs=1e12, nvlink_gbs=1e12, link_gbs=1e12)


def random_layout(total, num_ranks, seed, num_real=None):
    chunk = max(1, total // (3 * num_ranks))
    owner = np.random.default_rng(seed).integers(0, num_ranks, -(-total // chunk))
    return Layout(num_real or total, total, chunk, num_ranks, owner)


def measure(slices, layout, degree, ranks_per_node=8, min_piece=2, key_layout=None, two_hops=False):
    key_layout = key_layout or layout
    demand = find_demand(slices, layout, key_layout)
    remote = cut_stages(demand, key_layout, max(degree, 1), StageOptions(degree=degree, min_piece=min_piece))
    return measure_stages(demand, remote, layout, degree, ranks_per_node, key_layout, two_hops=two_hops)


def assert_same_work(work, plans):
    for field in fields(work):
        ours, theirs = getattr(work, field.name), getattr(plans, field.name)
        if field.name in ("tokens", "traffic"):
            assert np.array_equal(ours, theirs), field.name
        elif field.name not in ("tiles", "hops"):
            # Plans leave out stages in which no rank of the group receives anything.
            kept = np.flatnonzero(work.received.any(axis=0) | (np.arange(len(work.hops)) == 0))
            assert np.array_equal(np.array(ours)[..., kept], theirs), field.name


@settings(deadline=None, max_examples=60)
@given(random_masks(150), st.integers(1, 5), st.integers(0, 3), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_all_ranks_at_once_measure_as_their_plans_do(mask, num_ranks, degree, per_node, seed):
    total, slices = mask
    layout = random_layout(total, num_ranks, seed)
    work = measure(slices, layout, degree, per_node)
    options = StageOptions(degree=degree, min_piece=2)
    assert_same_work(work, work_of_plans(build_plans(slices, layout, range(num_ranks), options), per_node))
    assert work.pairs.sum() == slices.area()


@settings(deadline=None, max_examples=60)
@given(
    rectangular_masks(150),
    st.sampled_from([(1, 2), (2, 1), (2, 2), (3, 2), (2, 4)]),
    st.integers(0, 3),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_two_sequences_and_two_hops_measure_as_their_plans_do(mask, mesh_shape, degree, two_hops, seed):
    totals, slices = mask
    num_ranks = mesh_shape[0] * mesh_shape[1]
    layout, key_layout = (random_layout(total, num_ranks, seed + side) for side, total in enumerate(totals))
    work = measure(slices, layout, degree, mesh_shape[1], key_layout=key_layout, two_hops=two_hops)
    options = StageOptions(degree=degree, min_piece=2)
    mesh = mesh_shape if two_hops else None
    plans = build_plans(slices, layout, range(num_ranks), options, mesh, key_layout=key_layout)
    assert_same_work(work, work_of_plans(plans, mesh_shape[1]))
    assert work.pairs.sum() == slices.area()
    direct = measure(slices, layout, degree, mesh_shape[1], key_layout=key_layout)
    assert (work.links.received_inter.sum() <= direct.links.received_inter.sum()) or not two_hops


@settings(deadline=None, max_examples=30)
@given(random_masks(100), st.integers(1, 6), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_rows_between_nodes_against_every_single_row(mask, num_ranks, per_node, seed):
    total, slices = mask
    layout = random_layout(total, num_ranks, seed)
    work = measure(slices, layout, 1, per_node)
    owner = np.repeat(layout.owner, layout.chunk_size)[:total]
    received, sent = np.zeros(num_ranks, int), np.zeros(num_ranks, int)
    for reader, start, stop in find_demand(slices, layout).remote:
        sources = owner[start:stop]
        away = sources[sources // per_node != reader // per_node]
        received[reader] += len(away)
        np.add.at(sent, away, 1)
    assert work.links.received_inter.sum(axis=1).tolist() == received.tolist()
    assert work.links.sent_inter.sum(axis=1).tolist() == sent.tolist()


def test_padding_is_no_token():
    layout = random_layout(100, 3, seed=1, num_real=83)
    owner = np.repeat(layout.owner, layout.chunk_size)[:83]
    assert real_tokens(layout).tolist() == np.bincount(owner, minlength=3).tolist()


def test_groups_of_ranks_share_an_entry_of_the_traffic(monkeypatch):
    layout = random_layout(120, 5, seed=2)
    slices = SliceTable([[0, 120, 0, 120, 1]])
    single = measure(slices, layout, 1).traffic
    monkeypatch.setattr(stage_work, "MOST_GROUPS", 3)
    grouped = measure(slices, layout, 1).traffic
    edges = [0, 2, 4]
    assert np.array_equal(grouped, np.add.reduceat(np.add.reduceat(single, edges, axis=0), edges, axis=1))


@pytest.mark.parametrize(
    ("band", "tiles"),
    [
        ([0, 4 * TILE, 0, 3 * TILE, -UNBOUNDED, UNBOUNDED], 12),
        ([0, 4 * TILE, 0, 4 * TILE, -UNBOUNDED, 0], 10),
        ([0, 4 * TILE, 0, 4 * TILE, 0, 0], 4),
        ([0, 4 * TILE, 0, 4 * TILE, 1, 1], 7),
        ([7, 8, 9, 10, -UNBOUNDED, UNBOUNDED], 1),
        ([100, 101 + TILE, 0, TILE, -UNBOUNDED, UNBOUNDED], 2),
    ],
)
def test_tiles_of_known_bands(band, tiles):
    assert count_tiles(np.array([band])).tolist() == [tiles]


@settings(deadline=None, max_examples=60)
@given(random_masks(400))
def test_tiles_against_every_single_pair(mask):
    _, slices = mask
    bands, _ = band.shrink(slices.bands())
    counted = count_tiles(bands)
    for (q0, q1, k0, k1, d0, d1), tiles in zip(bands, counted, strict=True):
        i, j = np.mgrid[q0:q1, k0:k1]
        kept = (d0 <= j - i) & (j - i <= d1)
        touched = {*zip(((i - q0) // TILE)[kept].tolist(), ((j - k0) // TILE)[kept].tolist(), strict=True)}
        # A tile that the box cuts short may be counted although its diagonal lies outside of the box.
        edge = -(-(q1 - q0) // TILE) + -(-(k1 - k0) // TILE)
        assert len(touched) <= tiles <= len(touched) + edge


def test_balanced_work_without_travel_takes_area_over_rate():
    size = 8 * TILE
    slices = SliceTable([[i * size, (i + 1) * size, i * size, (i + 1) * size, 0] for i in range(4)])
    layout = Layout(4 * size, 4 * size, size, 4, np.arange(4))
    cluster = replace(FAST, forward_tflops=300.0, backward_tflops=200.0)
    prediction = predict(measure(slices, layout, 1), cluster, SHAPE)
    flop = 4 * SHAPE.heads_q * SHAPE.head_dim * size * size
    assert prediction.forward.seconds == pytest.approx(flop / 300e12)
    assert prediction.backward.seconds == pytest.approx(2.5 * flop / 200e12)
    assert prediction.efficiency == pytest.approx(1)


def test_degree_0_waits_for_all_rows_and_degree_1_does_not():
    size = 2 * TILE
    layout = Layout(2 * size, 2 * size, size, 2, np.arange(2))
    slices = SliceTable([[0, 2 * size, 0, 2 * size, 0]])
    cluster = replace(FAST, nvlink_gbs=100.0)
    travel = size * SHAPE.bytes_per_row / 100e9
    part = SHAPE.flop_per_pair * size * size / (cluster.forward_tflops * 1e12)
    assert predict(measure(slices, layout, 0), cluster, SHAPE).forward.seconds == pytest.approx(travel + 2 * part)
    overlapped = predict(measure(slices, layout, 1), cluster, SHAPE)
    assert overlapped.forward.seconds == pytest.approx(max(travel, part) + part)
    # Backward, the gradients go home after the last kernel.
    back = part * 2.5 * cluster.forward_tflops / cluster.backward_tflops
    assert overlapped.backward.seconds == pytest.approx(max(travel, back) + back + travel)


@pytest.mark.parametrize(
    ("memory_gbs", "nvlink_gbs", "early"),
    [
        (1e12, 0.25, 1.0),  # merging is free: all is computed early, to hide as much travel
        (1.0, 1e12, 0.0),  # travel is free: nothing is, so that nothing need be merged
        (40.0, 10.0, 0.125),  # an eighth hides it
    ],
)
def test_ranks_compute_as_much_early_as_pays(memory_gbs, nvlink_gbs, early):
    size = 8 * TILE
    layout = Layout(2 * size, 2 * size, size, 2, np.arange(2))
    slices = SliceTable([[0, size, 0, size, 0], [size, 2 * size, 0, 2 * size, 0]])
    cluster = replace(FAST, memory_gbs=memory_gbs, nvlink_gbs=nvlink_gbs, forward_tflops=1.0, backward_tflops=1.0)
    work = measure(slices, layout, 1)
    prediction = predict(work, cluster, SHAPE)
    kernel = SHAPE.flop_per_pair * size * size / 1e12
    merge = early * size * SHAPE.heads_q * SHAPE.head_dim * MERGE_BYTES / (memory_gbs * 1e9)
    computed = np.diff(prediction.forward.compute)[1, :, 0]
    assert computed == pytest.approx([early * kernel, (2 - early) * kernel + merge])
    # The other rank has nothing to fetch, and nothing to wait for.
    assert np.diff(prediction.forward.compute)[0, :, 0] == pytest.approx([kernel, 0])


def test_links_within_and_between_nodes_work_side_by_side():
    slices = SliceTable([[0, 4 * TILE, 0, 4 * TILE, 0]])
    layout = Layout(4 * TILE, 4 * TILE, TILE, 4, np.arange(4))
    work = measure(slices, layout, 1, ranks_per_node=2)
    row = SHAPE.bytes_per_row
    for nvlink, link, seconds in ((1.0, 1e9, TILE * row / 1e9), (1e9, 1.0, 2 * TILE * row / 1e9)):
        cluster = replace(FAST, nvlink_gbs=nvlink, link_gbs=link, ranks_per_node=2)
        fetch = predict(work, cluster, SHAPE).forward.fetch
        assert np.diff(fetch)[:, 1, 0] == pytest.approx(seconds)


@settings(deadline=None, max_examples=40)
@given(
    random_masks(2000),
    st.integers(1, 8),
    st.integers(0, 4),
    st.sampled_from(["link_gbs", "nvlink_gbs", "forward_tflops", "backward_tflops", "memory_gbs"]),
    st.integers(0, 2**32 - 1),
)
def test_a_faster_machine_is_never_slower(mask, num_ranks, degree, rate, seed):
    total, slices = mask
    work = measure(slices, random_layout(total, num_ranks, seed), degree, ranks_per_node=2, min_piece=16)
    cluster = Cluster(ranks_per_node=2)
    faster = replace(cluster, **{rate: 3 * getattr(cluster, rate)})
    slow, fast = (predict(work, each, SHAPE) for each in (cluster, faster))
    # A rank may arrange its kernels otherwise, for the sake of both passes together.
    fast_seconds, slow_seconds = (each.forward.seconds_by_rank + each.backward.seconds_by_rank for each in (fast, slow))
    assert (fast_seconds <= slow_seconds * (1 + 1e-12)).all()
    if slices.area():
        assert slow.efficiency <= 1


def test_two_hops_add_up_and_cross_once():
    # Both ranks of the second node read all rows of rank 0.
    layout = Layout(4 * TILE, 4 * TILE, TILE, 4, np.arange(4))
    slices = SliceTable([[2 * TILE, 4 * TILE, 0, TILE, 0]])
    shares = {}
    for two_hops in (False, True):
        work = measure(slices, layout, 1, 2, two_hops=two_hops)
        cluster = replace(FAST, nvlink_gbs=200.0, link_gbs=50.0, ranks_per_node=2, exchange_latency_us=3.0)
        fetch = predict(work, cluster, SHAPE).forward.fetch
        shares[two_hops] = np.diff(fetch)[:, 1, 0].tolist()
    crossing, inside = TILE * SHAPE.bytes_per_row / 50e9, TILE * SHAPE.bytes_per_row / 200e9
    assert shares[False] == pytest.approx([3e-6 + 2 * crossing, 3e-6, 3e-6 + crossing, 3e-6 + crossing])
    assert shares[True] == pytest.approx([6e-6 + crossing, 6e-6, 6e-6 + crossing + inside, 6e-6 + inside])


def test_traveling_queries_bring_their_outputs_home():
    # The last rank's few queries read all of the first rank's keys; nothing else is remote.
    slices = SliceTable([[0, 4 * TILE, 0, 4 * TILE, 0], [7 * TILE, 8 * TILE, 0, 4 * TILE, 0]])
    layout = Layout(8 * TILE, 8 * TILE, 4 * TILE, 2, np.arange(2))
    shape = LayerShape(8, 8, 128)
    costs = RowCosts.of_heads(shape.heads_q, shape.heads_kv, shape.head_dim)
    assert costs.keys == sum(shape.bytes_of_key_row)
    assert costs.queries == sum(shape.bytes_of_query_row)
    work = work_of_plans(build_plans(slices, layout, range(2), row_costs=costs))
    assert work.queries_travel.tolist() == [False, True, False]
    assert work.received.tolist() == [[0, TILE, 0], [0, 0, 0]]
    assert work.traffic.tolist() == [[0, TILE], [0, 0]]
    cluster = replace(FAST, nvlink_gbs=100.0, memory_gbs=1000.0)
    prediction = predict(work, cluster, shape)
    merge = 4 * TILE * 8 * 128 * MERGE_BYTES / 1e12
    q, number = 8 * 128 * 2, 8 * 4
    assert np.diff(prediction.forward.fetch)[:, 1, 0] == pytest.approx([TILE * q / 1e11] * 2)
    assert np.diff(prediction.forward.send_home)[:, 1, 0] == pytest.approx([TILE * (q + number) / 1e11 + merge] * 2)
    assert np.diff(prediction.backward.fetch)[:, 1, 0] == pytest.approx([TILE * 2 * (q + number) / 1e11] * 2)
    assert np.diff(prediction.backward.send_home)[:, 1, 0] == pytest.approx([TILE * q / 1e11 + merge] * 2)
    assert (prediction.forward.send_home[:, 1, 0] >= prediction.forward.compute[:, 1, 1]).all()


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="link_gbs must be positive, not 0"):
        Cluster(link_gbs=0)
    with pytest.raises(ValueError, match="kernel_latency_us must be positive, not -1"):
        Cluster(kernel_latency_us=-1)
    with pytest.raises(ValueError, match="heads_q must be a multiple of heads_kv=3, not 8"):
        LayerShape(8, 3)
    with pytest.raises(ValueError, match="head_dim must be at least 1, not 0"):
        LayerShape(head_dim=0)
