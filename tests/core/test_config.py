# SPDX-License-Identifier: Apache-2.0
"""Config classes: defaults, equality, contradictions, and what the environment fills in."""

import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch

from magi_attention import config as config_module
from magi_attention.common.enum import AttnOverlapMode, DispatchAlgType, MagiAttentionKernelBackend, OverlapAlgType
from magi_attention.config import (
    BatchToppHeapDispatchAlg,
    BSDispatchAlg,
    BTPDispatchAlg,
    DispatchAlg,
    DispatchConfig,
    DistAttnConfig,
    DPDispatchAlg,
    GreedyOverlapAlg,
    GrpCollConfig,
    LBDispatchAlg,
    LocalityDispatchAlg,
    MinHeapDispatchAlg,
    OverlapAlg,
    OverlapConfig,
    RandomSelectDispatchAlg,
    RuntimeConfig,
    SequentialDispatchAlg,
    SortedSequentialSelectAlg,
    ToppHeapDispatchAlg,
    UniformOverlapAlg,
)
from magi_attention.env import VARIABLES

DYNAMIC, STATIC = AttnOverlapMode.DYNAMIC, AttnOverlapMode.STATIC


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_defaults():
    config = DistAttnConfig()
    assert config.dispatch_config == DispatchConfig(chunk_size=None, uneven_shard=False, alg=LocalityDispatchAlg())
    overlap = config.overlap_config
    assert (overlap.mode, overlap.degree, overlap.dynamic_max_degree) == (STATIC, 1, 8)
    assert (overlap.min_chunk_size, overlap.max_num_chunks, overlap.alg) == (512, 64, UniformOverlapAlg())
    assert (overlap.calc_cost_factor, overlap.comm_cost_factor) == (1.0, 1.0)
    assert dataclasses.astuple(config.grpcoll_config) == (24, 8, 256, 16, 128, 2_000_000_000, 0)
    assert set(dataclasses.asdict(config.runtime_config).values()) == {None}


def test_numbers_of_other_libraries_become_plain_ones():
    assert repr(DispatchConfig(chunk_size=np.int64(64))) == repr(DispatchConfig(chunk_size=64))
    assert repr(DispatchConfig(chunk_size=torch.tensor(64))) == repr(DispatchConfig(chunk_size=64))
    given = OverlapConfig(degree=np.int32(0), calc_cost_factor=np.float32(2.5), comm_cost_factor=np.float64(0.5))
    assert repr(given) == repr(OverlapConfig(degree=0, calc_cost_factor=2.5, comm_cost_factor=0.5))
    assert given.no_overlap
    assert repr(ToppHeapDispatchAlg(np.float64(0.5))) == repr(ToppHeapDispatchAlg(0.5))


@pytest.mark.parametrize("chunk_size", [np.float64(64), np.bool_(True), np.array([64, 64]), torch.tensor(64.0)])
def test_what_is_no_integer_is_refused(chunk_size):
    with pytest.raises(TypeError, match="chunk_size must be int or None"):
        DispatchConfig(chunk_size=chunk_size)


ALGORITHMS = [
    # class, type, optimal, partitions, equal counts, affinity
    (LocalityDispatchAlg, "locality", False, True, False, True),
    (MinHeapDispatchAlg, "min_heap", False, True, False, False),
    (ToppHeapDispatchAlg, "topp_heap", False, True, True, True),
    (SequentialDispatchAlg, "sequential_select", False, True, False, False),
    (SortedSequentialSelectAlg, "sorted_sequential_select", False, True, True, False),
    (BSDispatchAlg, "binary_search", True, True, False, False),
    (LBDispatchAlg, "lower_bound", False, False, False, False),
    (DPDispatchAlg, "dynamic_programming", True, False, False, False),
]


@pytest.mark.parametrize(("alg", "value", "optimal", "partitions", "equal", "affinity"), ALGORITHMS)
def test_dispatch_algorithms(alg, value, optimal, partitions, equal, affinity):
    made = alg()
    assert made.type is DispatchAlgType(value)
    assert (made.is_optimal, made.is_partitions_returned) == (optimal, partitions)
    assert (made.is_equal_num_workloads, made.is_affinity_considered) == (equal, affinity)
    assert DispatchConfig(alg=made) == DispatchConfig(alg=alg())
    if equal:
        with pytest.raises(AssertionError, match="uneven_shard"):
            DispatchConfig(alg=made, uneven_shard=True)
    else:
        assert DispatchConfig(alg=made, uneven_shard=True).uneven_shard


def test_every_algorithm_has_its_own_type_and_its_fields():
    classes = [row[0] for row in ALGORITHMS] + [BTPDispatchAlg, RandomSelectDispatchAlg, BatchToppHeapDispatchAlg]
    assert {alg.type for alg in classes} == set(DispatchAlgType)
    assert len({alg() for alg in classes}) == len(classes)
    assert ToppHeapDispatchAlg().top_p == 0.0
    assert SortedSequentialSelectAlg().allocation_ratio == 1.0
    assert BatchToppHeapDispatchAlg(0.5) == BatchToppHeapDispatchAlg(top_p=0.5, num_of_select_chunk=1)
    assert UniformOverlapAlg() == UniformOverlapAlg(random_costs=False, random_seed=None)
    assert (UniformOverlapAlg.type, GreedyOverlapAlg.type) == (OverlapAlgType.UNIFORM, OverlapAlgType.GREEDY)


def test_some_algorithms_are_not_exported():
    hidden = {"ToppHeapDispatchAlg", "BTPDispatchAlg", "RandomSelectDispatchAlg", "BatchToppHeapDispatchAlg"}
    assert not hidden & set(config_module.__all__)
    assert all(hasattr(config_module, name) for name in config_module.__all__)


def test_an_automatic_degree_is_dynamic():
    for mode in (STATIC, DYNAMIC):
        overlap = OverlapConfig(mode=mode, degree="auto")
        assert (overlap.mode, overlap.enable, overlap.no_overlap) == (DYNAMIC, True, False)
    with pytest.raises(AssertionError, match="dynamic_max_degree"):
        OverlapConfig(degree="auto", dynamic_max_degree=None)


def test_an_automatic_degree_is_1_where_queries_travel(monkeypatch):
    automatic = OverlapConfig(degree="auto")
    traveling = RuntimeConfig(qo_comm=True)
    assert DistAttnConfig(overlap_config=automatic, runtime_config=traveling).overlap_config == OverlapConfig(degree=1)
    monkeypatch.setenv("MAGI_ATTENTION_QO_COMM", "1")
    assert DistAttnConfig(overlap_config=automatic).overlap_config == OverlapConfig(degree=1)
    staying = RuntimeConfig(qo_comm=False)
    assert DistAttnConfig(overlap_config=automatic, runtime_config=staying).overlap_config == automatic


DIFFERENT = [
    DistAttnConfig(),
    DistAttnConfig(overlap_config=OverlapConfig(degree=0)),
    DistAttnConfig(overlap_config=OverlapConfig(degree=4)),
    DistAttnConfig(overlap_config=OverlapConfig(degree="auto")),
    DistAttnConfig(overlap_config=OverlapConfig(degree=None, mode=DYNAMIC)),
    DistAttnConfig(dispatch_config=DispatchConfig(chunk_size=64)),
    DistAttnConfig(dispatch_config=DispatchConfig(uneven_shard=True)),
    DistAttnConfig(dispatch_config=DispatchConfig(alg=SequentialDispatchAlg())),
    DistAttnConfig(grpcoll_config=GrpCollConfig(num_sms=8)),
    DistAttnConfig(runtime_config=RuntimeConfig(deterministic=True)),
    DistAttnConfig(runtime_config=RuntimeConfig(deterministic=False)),
]


def test_configs_are_values():
    assert len(set(DIFFERENT)) == len(DIFFERENT)
    for config in DIFFERENT:
        assert pickle.loads(pickle.dumps(config)) == dataclasses.replace(config) == config
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.overlap_config = OverlapConfig()


def test_degrees_zero_and_one_differ():
    zero, one = OverlapConfig(degree=0), OverlapConfig(degree=1)
    assert zero != one
    assert hash(zero) != hash(one)
    assert (zero.no_overlap, one.no_overlap) == (True, False)
    assert dataclasses.replace(zero, min_chunk_size=256).no_overlap


@pytest.mark.parametrize(
    ("config", "enable", "no_overlap"),
    [
        (OverlapConfig(degree=0), False, True),
        (OverlapConfig(degree=1), False, False),
        (OverlapConfig(degree=2), True, False),
        (OverlapConfig(degree=None, mode=DYNAMIC), True, False),
    ],
)
def test_overlap_properties(config, enable, no_overlap):
    assert (config.enable, config.no_overlap) == (enable, no_overlap)


@pytest.mark.parametrize("degree", [0, 1])
def test_degrees_up_to_one_are_static(degree):
    assert OverlapConfig(mode=DYNAMIC, degree=degree) == OverlapConfig(degree=degree)


CONTRADICTIONS = [
    (lambda: OverlapConfig(degree=None), "DYNAMIC"),
    (lambda: OverlapConfig(degree=65), "max_num_chunks=64"),
    (lambda: OverlapConfig(mode=DYNAMIC, degree=2), "pass None or .auto., not 2"),
    (lambda: OverlapConfig(mode=DYNAMIC, degree=None, dynamic_max_degree=0), "dynamic_max_degree.*not 0"),
    (lambda: OverlapConfig(mode=DYNAMIC, degree=None, dynamic_max_degree=None), "dynamic_max_degree"),
    (lambda: OverlapConfig(degree=-1), "not -1"),
    (lambda: OverlapConfig(min_chunk_size=0), "min_chunk_size.*not 0"),
    (lambda: OverlapConfig(max_num_chunks=0), "max_num_chunks.*not 0"),
    (lambda: OverlapConfig(degree="automatic"), "a number, 'auto' or None, not 'automatic'"),
    (lambda: OverlapConfig(calc_cost_factor=0.0), "calc_cost_factor"),
    (lambda: OverlapConfig(comm_cost_factor=-1.0), "comm_cost_factor"),
    (lambda: OverlapConfig(comm_cost_factor=math.inf), "comm_cost_factor must be finite, not inf"),
    (lambda: OverlapConfig(calc_cost_factor=math.nan), "calc_cost_factor must be positive, not nan"),
    (lambda: UniformOverlapAlg(random_costs=True, random_seed=-1), "random_seed must be at least 0, not -1"),
    (lambda: DispatchConfig(chunk_size=0), "chunk_size.*not 0"),
    (lambda: ToppHeapDispatchAlg(top_p=1.5), "top_p"),
    (lambda: SortedSequentialSelectAlg(allocation_ratio=0.0), "allocation_ratio"),
    (lambda: BatchToppHeapDispatchAlg(num_of_select_chunk=0), "num_of_select_chunk"),
    (lambda: GrpCollConfig(num_sms=0), "num_sms"),
    (lambda: GrpCollConfig(num_rdma_bytes=-1), "num_rdma_bytes"),
    (lambda: GrpCollConfig.get_default_group_cast_config(3), "num_ranks.*not 3"),
    (lambda: GrpCollConfig.get_default_group_reduce_config(7), "num_ranks.*not 7"),
    (lambda: RuntimeConfig(kernel_backend="nope"), "kernel_backend.*auto.*'nope'"),
    (lambda: RuntimeConfig(kernel_backend_backward="nope"), "kernel_backend_backward.*same, auto.*'nope'"),
    (lambda: RuntimeConfig(kernel_backend_backward="fa4", deterministic=True), "fa4 and deterministic"),
    (lambda: RuntimeConfig(precision="fp8"), "precision.*bf16.*'fp8'"),
    (lambda: RuntimeConfig(sink_grad_reduce="max"), "sink_grad_reduce.*none, sum, avg.*'max'"),
    (lambda: RuntimeConfig(forward_sm_margin=-1), "forward_sm_margin"),
    (lambda: RuntimeConfig(hierarchical_comm=True, qo_comm=True), "hierarchical_comm and qo_comm"),
    (lambda: RuntimeConfig(hierarchical_comm=True, native_grpcoll=True), "hierarchical_comm and native_grpcoll"),
    (lambda: RuntimeConfig(native_grpcoll=True, deterministic=True), "native_grpcoll and deterministic"),
    (lambda: RuntimeConfig(check_plan_timeout=0), "check_plan_timeout must be positive, not 0"),
    (lambda: RuntimeConfig(kernel_backend="fa4", deterministic=True), "fa4 and deterministic"),
    (lambda: RuntimeConfig(kernel_backend="fa4", forward_high_precision_reduce=True), "fa4 and forward"),
    (lambda: RuntimeConfig(kernel_backend="fa4", backward_high_precision_reduce=True), "fa4 and backward"),
    (lambda: RuntimeConfig(kernel_backend="fa4", qo_comm=True), "fa4 and qo_comm"),
    (
        lambda: DistAttnConfig(overlap_config=OverlapConfig(degree=2), runtime_config=RuntimeConfig(qo_comm=True)),
        "qo_comm needs.*degree=2",
    ),
]


@pytest.mark.parametrize(("make", "words"), CONTRADICTIONS)
def test_contradictions_raise_when_built(make, words):
    for error in (ValueError, AssertionError):
        with pytest.raises(error, match=words):
            make()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: OverlapConfig(mode="static"), "mode"),
        (lambda: OverlapConfig(degree=1.0), "degree"),
        (lambda: OverlapConfig(degree=True), "degree"),
        (lambda: OverlapConfig(alg=OverlapAlg()), "subclass"),
        (lambda: UniformOverlapAlg(random_costs=1), "random_costs must be bool, not 1"),
        (lambda: UniformOverlapAlg(random_costs=True, random_seed=0.5), "random_seed must be int or None, not 0.5"),
        (lambda: DispatchConfig(alg=DispatchAlg()), "subclass"),
        (lambda: DispatchConfig(alg="min_heap"), "alg"),
        (lambda: DispatchConfig(chunk_size=1.5), "chunk_size"),
        (lambda: DistAttnConfig(DispatchConfig(), DispatchConfig()), "overlap_config"),
        (lambda: DistAttnConfig(runtime_config={}), "runtime_config"),
        (lambda: RuntimeConfig(deterministic=1), "deterministic"),
        (lambda: RuntimeConfig(kernel_backend=1), "kernel_backend"),
        (lambda: RuntimeConfig(check_plan_timeout="soon"), "check_plan_timeout must be int or None, not 'soon'"),
    ],
)
def test_wrong_types(make, words):
    for error in (TypeError, AssertionError):
        with pytest.raises(error, match=words):
            make()


def test_what_the_blackwell_backend_can_do_is_its_own_answer():
    config = RuntimeConfig(kernel_backend="blackwell", kernel_backend_backward="cudnn_flex", deterministic=True)
    assert config.resolved().kernel_backend == "blackwell"


def test_group_collective_settings():
    config = GrpCollConfig(num_sms=8, num_rdma_bytes=5)
    assert config.to_kernel_config() == {
        "num_sms": 8,
        "nvl_chunk_size": 8,
        "nvl_buffer_size": 256,
        "rdma_chunk_size": 16,
        "rdma_buffer_size": 128,
    }
    assert config.to_buffer_args() == {"num_nvl_bytes": 2_000_000_000, "num_rdma_bytes": 5}
    for num_ranks in (2, 4, 8, 16, 24, 32, 64, 128, 144, 160):
        assert isinstance(GrpCollConfig.get_default_group_cast_config(num_ranks), GrpCollConfig)
        assert isinstance(GrpCollConfig.get_default_group_reduce_config(num_ranks), GrpCollConfig)


def test_resolving_without_any_variable():
    resolved = DistAttnConfig().resolved()
    assert resolved.runtime_config == RuntimeConfig(
        kernel_backend="auto",
        kernel_backend_backward="same",
        precision="input",
        deterministic=False,
        hierarchical_comm=False,
        qo_comm=False,
        native_grpcoll=False,
        forward_high_precision_reduce=False,
        backward_high_precision_reduce=False,
        keep_received=True,
        sink_grad_reduce="none",
        forward_sm_margin=None,
        backward_sm_margin=None,
        flatten_head_groups=False,
        auto_range_merge=False,
        check_plan=True,
        check_plan_timeout=600,
        skip_overlap_check=False,
        sanity_check=False,
    )
    assert resolved.resolved() == resolved


FIELDS = [
    ("kernel_backend", "MAGI_ATTENTION_KERNEL_BACKEND", "FLEX", "flex", "reference"),
    ("kernel_backend_backward", "MAGI_ATTENTION_KERNEL_BACKEND_BACKWARD", "Flex", "flex", "same"),
    ("precision", "MAGI_ATTENTION_PRECISION", "bf16", "bf16", "input"),
    ("deterministic", "MAGI_ATTENTION_DETERMINISTIC_MODE", "1", True, False),
    ("hierarchical_comm", "MAGI_ATTENTION_HIERARCHICAL_COMM", "1", True, False),
    ("qo_comm", "MAGI_ATTENTION_QO_COMM", "1", True, False),
    ("native_grpcoll", "MAGI_ATTENTION_NATIVE_GRPCOLL", "1", True, False),
    ("forward_high_precision_reduce", "MAGI_ATTENTION_FORWARD_HIGH_PRECISION_REDUCE", "1", True, False),
    ("backward_high_precision_reduce", "MAGI_ATTENTION_BACKWARD_HIGH_PRECISION_REDUCE", "1", True, False),
    ("keep_received", "MAGI_ATTENTION_KEEP_RECEIVED", "0", False, True),
    ("sink_grad_reduce", "MAGI_ATTENTION_DSINK_ALL_REDUCE_OP", "sum", "sum", "avg"),
    ("forward_sm_margin", "MAGI_ATTENTION_FFA_FORWARD_SM_MARGIN", "7", 7, 0),
    ("backward_sm_margin", "MAGI_ATTENTION_FFA_BACKWARD_SM_MARGIN", "9", 9, 0),
    ("flatten_head_groups", "MAGI_ATTENTION_FLATTEN_HEAD_GROUPS", "1", True, False),
    ("auto_range_merge", "MAGI_ATTENTION_AUTO_RANGE_MERGE", "1", True, False),
    ("check_plan", "MAGI_ATTENTION_CHECK_PLAN", "0", False, True),
    ("check_plan_timeout", "MAGI_ATTENTION_CHECK_PLAN_TIMEOUT", "90", 90, 5),
    ("skip_overlap_check", "MAGI_ATTENTION_SKIP_OVERLAP_CHECK", "1", True, False),
    ("sanity_check", "MAGI_ATTENTION_SANITY_CHECK", "1", True, False),
]


@pytest.mark.parametrize(("field", "variable", "text", "value", "other"), FIELDS)
def test_the_environment_fills_what_the_config_leaves_open(monkeypatch, field, variable, text, value, other):
    monkeypatch.setenv(variable, text)
    assert getattr(RuntimeConfig().resolved(), field) == value
    assert getattr(RuntimeConfig(**{field: other}).resolved(), field) == other


def test_every_field_has_a_variable():
    assert [row[0] for row in FIELDS] == [field.name for field in dataclasses.fields(RuntimeConfig)]


def test_a_contradiction_with_the_environment_raises_when_resolved(monkeypatch):
    monkeypatch.setenv("MAGI_ATTENTION_DETERMINISTIC_MODE", "1")
    config = DistAttnConfig(runtime_config=RuntimeConfig(native_grpcoll=True))
    with pytest.raises(AssertionError, match="native_grpcoll and deterministic"):
        config.resolved()


def test_margins_are_left_open_unless_somebody_chose_them(monkeypatch):
    resolved = RuntimeConfig(native_grpcoll=True).resolved()
    assert (resolved.forward_sm_margin, resolved.backward_sm_margin) == (None, None)
    monkeypatch.setenv("MAGI_ATTENTION_FFA_FORWARD_SM_MARGIN", "3")
    resolved = RuntimeConfig(native_grpcoll=True, backward_sm_margin=5).resolved()
    assert (resolved.forward_sm_margin, resolved.backward_sm_margin) == (3, 5)


def test_traveling_queries_replace_the_overlap_config(monkeypatch):
    early = DistAttnConfig(overlap_config=OverlapConfig(degree=4))
    monkeypatch.setenv("MAGI_ATTENTION_QO_COMM", "1")
    assert DistAttnConfig(overlap_config=OverlapConfig(degree=4)).overlap_config == OverlapConfig(degree=1)
    assert early.resolved().overlap_config == OverlapConfig(degree=1)
    assert early.overlap_config == OverlapConfig(degree=4)
    kept = DistAttnConfig(overlap_config=OverlapConfig(degree=4), runtime_config=RuntimeConfig(qo_comm=False))
    assert kept.resolved().overlap_config == OverlapConfig(degree=4)


def test_a_backend_may_be_given_as_enum():
    assert RuntimeConfig(kernel_backend=MagiAttentionKernelBackend.FFA) == RuntimeConfig(kernel_backend="ffa")
