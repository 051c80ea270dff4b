# SPDX-License-Identifier: Apache-2.0
"""Rates as values and files, and the overlap degree that is chosen by them."""

import json
import logging
import math
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention.common import workloads
from magi_attention.config import LocalityDispatchAlg, MinHeapDispatchAlg
from magi_attention.plan.degree import _Stages, choose_degree
from magi_attention.plan.demand import find_demand
from magi_attention.plan.dispatch import make_layout
from magi_attention.plan.rates import (
    DEFAULT_RATES,
    EARLY_SHARES,
    MERGE_BYTES,
    TILE,
    Cluster,
    LayerShape,
    Rates,
    default_rates,
)
from magi_attention.plan.simulate import predict
from magi_attention.plan.stage_work import StageWork, measure_stages
from magi_attention.plan.stages import StageOptions, cut_stages
from magi_attention.plan.traffic import LinkRows
from magi_attention.runtime import rates as rates_module
from magi_attention.runtime.machine import Machine
from magi_attention.runtime.rates_file import load_rates, newest_rates_path, rates_path, read_rates, save_rates

MACHINE = Machine("NVIDIA Test 100/80GB", "flex", "bfloat16", 128, "alltoall over nccl", 16, 8, "torch 1")
FIELDS = list(Rates().to_json())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MAGI_ATTENTION_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@given(st.lists(st.floats(1e-6, 1e6), min_size=len(FIELDS), max_size=len(FIELDS)))
def test_json_and_back(values):
    rates = Rates(**dict(zip(FIELDS, values, strict=True)))
    assert Rates.from_json(json.loads(json.dumps(rates.to_json()))) == rates
    assert Cluster.of_nodes(rates, 4) == Cluster(**rates.to_json(), ranks_per_node=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"link_gbs": 0}, "link_gbs must be positive, not 0"),
        ({"memory_gbs": math.inf}, "memory_gbs must be positive, not inf"),
        ({"memory_gbs": math.nan}, "memory_gbs must be positive, not nan"),
        ({"kernel_latency_us": -1}, "kernel_latency_us must be positive, not -1"),
        ({"forward_tflops": "fast"}, "forward_tflops must be a number, not 'fast'"),
        ({"forward_tflops": True}, "forward_tflops must be a number, not True"),
        ({"sideways_tflops": 1.0}, "rates must have the entries backward_tflops, .* not .*sideways_tflops"),
    ],
)
def test_json_that_is_no_rates(change, message):
    with pytest.raises(ValueError, match=message):
        Rates.from_json(Rates().to_json() | change)


@pytest.mark.parametrize("entries", [None, [], 3, {}, {"link_gbs": 1.0}])
def test_json_of_another_shape(entries):
    with pytest.raises(ValueError, match="rates must have the entries"):
        Rates.from_json(entries)


def test_defaults_by_the_name_of_the_device():
    assert default_rates("NVIDIA H100 80GB HBM3") == Rates() == default_rates("a GPU of tomorrow")
    assert default_rates("NVIDIA A100-SXM4-40GB") == DEFAULT_RATES["A100"] != Rates()
    assert default_rates("NVIDIA B200").forward_tflops > default_rates("NVIDIA H200").forward_tflops
    assert default_rates("cpu").forward_tflops < 1


def test_a_file_is_found_again_by_the_same_machine_only(folder):
    rates = Rates(link_gbs=12.5)
    assert load_rates(MACHINE) is None
    assert newest_rates_path() is None
    path = save_rates(MACHINE, rates)
    assert path == rates_path(MACHINE) == newest_rates_path()
    assert path.parent.parent == folder
    assert load_rates(MACHINE) == read_rates(path) == rates
    for change in ({"device": "cpu"}, {"num_ranks": 8}, {"transport": "native over nccl"}, {"versions": "torch 2"}):
        assert load_rates(replace(MACHINE, **change)) is None
    save_rates(MACHINE, Rates())
    assert load_rates(MACHINE) == Rates()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: "",
        lambda text: text[:50],
        lambda text: "[1, 2]",
        lambda text: "\xff",
        lambda text: text.replace('"format": 1', '"format": 0'),
        lambda text: text.replace("nccl", "gloo"),
        lambda text: text.replace('"link_gbs": 50.0', '"link_gbs": -50.0'),
    ],
)
def test_a_spoiled_or_foreign_file_is_ignored_with_one_warning(folder, caplog, spoil):
    path = save_rates(MACHINE, Rates())
    path.write_text(spoil(path.read_text()), encoding="latin-1")
    with caplog.at_level(logging.INFO):
        assert load_rates(MACHINE) is None
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert str(path) in record.getMessage()


def test_others_may_read_what_was_measured_and_no_half_file_stays(folder, monkeypatch):
    before = os.umask(0o022)
    try:
        path = save_rates(MACHINE, Rates())
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o644

    def fail(*arguments):
        raise OSError("no room")

    monkeypatch.setattr(os, "replace", fail)
    assert save_rates(MACHINE, Rates(link_gbs=1)) is None
    assert list(path.parent.iterdir()) == [path]
    assert load_rates(MACHINE) == Rates()


def test_a_folder_that_cannot_be_written_to_is_no_error(folder, caplog):
    folder.write_text("a file, not a folder")
    assert save_rates(MACHINE, Rates()) is None
    assert "can't be kept" in caplog.text


@settings(deadline=None)
@given(
    st.integers(1, 6),
    st.tuples(*[st.integers(0, 40)] * 3),
    st.sampled_from([0.0, 20.0]),
    st.floats(1.0, 2000.0),
)
def test_the_closed_form_is_the_timeline_of_equal_stages(degree, work, latency, link):
    own, tiles, rows = work
    cluster = Cluster(
        ranks_per_node=1, link_gbs=link, exchange_latency_us=latency, kernel_latency_us=latency, backward_tflops=300.0
    )
    shape = LayerShape()
    counts = np.array([[own + 1] + [tiles + 1] * degree])
    moved = np.array([[0] + [TILE * (rows + 1)] * degree])
    tokens = np.array([1024])
    stage_work = StageWork(
        tokens=tokens,
        pairs=counts * TILE**2,
        tiles=counts,
        links=LinkRows(moved, moved, 0 * moved, 0 * moved),
        hops=np.ones(degree + 1, np.int64),
        queries_travel=np.zeros(degree + 1, bool),
        traffic=np.zeros((1, 1), np.int64),
    )
    prediction = predict(stage_work, cluster, shape)
    fetch = latency * 1e-6 + moved[0, 1] * shape.bytes_per_row / (link * 1e9)
    merge = tokens[0] * shape.heads_q * shape.head_dim * MERGE_BYTES / 3e12
    share = np.array(EARLY_SHARES)
    passes = []
    for seconds_per_tile, method in (
        (TILE**2 * shape.flop_per_pair / 600e12, _Stages.forward),
        (TILE**2 * shape.flop_per_pair * 2.5 / 300e12, _Stages.backward),
    ):
        own, remote = (count * seconds_per_tile for count in counts[0, :2])
        stages = _Stages(
            degree=np.array(degree),
            early=share * own + (share > 0) * latency * 1e-6,
            first=(1 - share) * own + remote + latency * 1e-6 + share * merge,
            stage=np.array(latency * 1e-6 + remote + merge),
            fetch=np.array(fetch),
        )
        passes.append(method(stages))
    best = np.sum(passes, axis=0).min()
    assert prediction.seconds == pytest.approx(best)
    nearly_best = np.isclose(np.sum(passes, axis=0), best)
    assert np.isclose(passes[0][nearly_best], prediction.forward.seconds).any()


def planned(name, total, num_ranks, algorithm=LocalityDispatchAlg(), chunks_per_rank=8):  # noqa: B008
    mask, chunk = workloads.make(name, total), total // (chunks_per_rank * num_ranks)
    layout = make_layout(mask, num_real=total, total=total, chunk_size=chunk, num_ranks=num_ranks, algorithm=algorithm)
    return find_demand(mask, layout), layout


def predicted_by_degree(demand, layout, options, two_hops=False):
    works = [
        measure_stages(demand, cut_stages(demand, layout, max(n, 1), options), layout, n, 8, two_hops=two_hops)
        for n in range(options.max_degree + 1)
    ]
    return [predict(work, options.cluster, options.shape).seconds for work in works]


@pytest.mark.parametrize("link", [10.0, 50.0])
@pytest.mark.parametrize("name", workloads.WORKLOADS)
def test_the_chosen_degree_is_close_to_the_best_that_is_simulated(name, link):
    demand, layout = planned(name, 1 << 20, 64)
    options = StageOptions(degree=None, cluster=Cluster(link_gbs=link))
    predicted = predicted_by_degree(demand, layout, options)
    assert predicted[choose_degree(demand, layout, layout, options)] <= 1.05 * min(predicted)


def test_the_choice_matters():
    demand, layout = planned("causal", 1 << 20, 64)
    options = StageOptions(degree=None, cluster=Cluster())
    predicted = predicted_by_degree(demand, layout, options)
    chosen = choose_degree(demand, layout, layout, options)
    assert chosen > 1
    assert predicted[1] > 1.1 * predicted[chosen]


@pytest.mark.parametrize("name", ["causal", "varlen_causal", "prefix_lm"])
def test_the_chosen_degree_is_close_to_the_best_in_two_hops(name):
    demand, layout = planned(name, 1 << 20, 64)
    options = StageOptions(degree=None, cluster=Cluster(link_gbs=20))
    predicted = predicted_by_degree(demand, layout, options, two_hops=True)
    chosen = choose_degree(demand, layout, layout, options, mesh_shape=(8, 8))
    assert predicted[chosen] <= 1.05 * min(predicted)
    if name == "causal":  # all ranks of a node read the same rows, of which far fewer cross than in one hop
        assert chosen < choose_degree(demand, layout, layout, options)


@pytest.mark.parametrize("name", ["varlen_causal", "varlen_block_causal_4k", "prefix_lm"])
def test_rows_that_cross_in_several_stages_count(name):
    # The heap gives all ranks of a node chunks of one document, so that many rows that they share cross in most stages.
    demand, layout = planned(name, 1 << 20, 64, MinHeapDispatchAlg(), 64)
    options = StageOptions(degree=None, cluster=Cluster(link_gbs=20))
    predicted = predicted_by_degree(demand, layout, options, two_hops=True)
    chosen = choose_degree(demand, layout, layout, options, mesh_shape=(8, 8))
    assert predicted[chosen] <= 1.05 * min(predicted)
    assert predicted[8] > 1.15 * min(predicted)


def test_the_links_that_rows_take_count():
    demand, layout = planned("causal", 1 << 18, 16)
    slow_between_nodes = Cluster(link_gbs=5.0, nvlink_gbs=5000.0, ranks_per_node=8)
    one_node = replace(slow_between_nodes, ranks_per_node=16)
    options = StageOptions(degree=None, cluster=slow_between_nodes)
    assert choose_degree(demand, layout, layout, options) > 1
    assert choose_degree(demand, layout, layout, replace(options, cluster=one_node)) == 1


def test_latencies_make_one_kernel_the_best_and_nothing_to_fetch_leaves_nothing_to_choose():
    demand, layout = planned("causal", 4096, 4)
    options = StageOptions(degree=None, min_piece=16, cluster=Cluster(kernel_latency_us=1e6))
    assert choose_degree(demand, layout, layout, options) == 1
    predicted = predicted_by_degree(demand, layout, options)
    assert predicted[1] <= predicted[0] < 0.6 * predicted[2]  # one kernel each for both passes
    demand, layout = planned("causal", 4096, 1)
    assert choose_degree(demand, layout, layout, options) == 1


@pytest.mark.parametrize("max_degree", [1, 3])
def test_no_more_stages_than_allowed_or_than_pieces(max_degree):
    demand, layout = planned("full", 1 << 17, 8)
    # Fast kernels and slow links: more stages always gain a little.
    options = StageOptions(degree=None, max_degree=max_degree, cluster=Cluster(link_gbs=30, nvlink_gbs=30))
    assert choose_degree(demand, layout, layout, options) <= max_degree
    assert choose_degree(demand, layout, layout, replace(options, min_piece=1 << 20)) <= 1


def test_nothing_is_measured_or_sent_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(rates_module, "machine_of", lambda *args: MACHINE)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(rates_module, "_agree", None)
    key = SimpleNamespace(cp_group=None, cp_mesh=None, group_ranks=(0, 1))
    layer = SimpleNamespace(device=torch.device("cuda"))
    before = dict(rates_module._agreed)
    cluster = rates_module.agree_on_cluster(key, layer, SimpleNamespace(name="alltoall"))
    assert cluster == Cluster.of_nodes(default_rates(MACHINE.device), 1)
    assert rates_module._agreed == before
