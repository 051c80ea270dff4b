# SPDX-License-Identifier: Apache-2.0
"""``OverlapConfig(degree="auto")``: rates measured once, agreed on by all ranks, kept and reused; and right answers."""

import contextlib
import logging
import os
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from magi_attention.api import clear_cache
from magi_attention.common.slices import SliceTable
from magi_attention.config import DistAttnConfig, OverlapConfig, RuntimeConfig
from magi_attention.plan.rates import Rates, default_rates
from magi_attention.runtime import rates as rates_module
from magi_attention.runtime.cache import find_manager
from magi_attention.runtime.machine import count_ranks_per_node, device_name, group_device, layer_of, machine_of
from magi_attention.runtime.measure import measure_kernels, measure_links
from magi_attention.runtime.rates_file import rates_path, save_rates
from magi_attention.testing.distributed import RankError, RankPool
from magi_attention.testing.masks import MASK_FAMILIES
from tests.distributed.attention_case import Case, assert_right, attend, group_of, key_of

NUM_CPU_RANKS = 4
CAUSAL = SliceTable([[0, 256, 0, 256, 1]])
# Links that are worth hiding in several stages, and kernels that are not worth launching twice.
SLOW_LINKS = Rates(nvlink_gbs=2e-4, forward_tflops=1e-4, backward_tflops=2.5e-4, exchange_latency_us=0)
SLOW_LAUNCHES = Rates(kernel_latency_us=1e6)


@pytest.fixture(scope="module", params=["gloo", "nccl"])
def pool(request):
    """Four processes on the CPU; or one for each GPU."""
    num_ranks = NUM_CPU_RANKS if request.param == "gloo" else min(torch.cuda.device_count(), NUM_CPU_RANKS)
    if num_ranks < 2:
        pytest.skip(f"NCCL between ranks needs 2 GPUs, this machine has {num_ranks}")
    with RankPool(num_ranks, request.param) as pool:
        yield pool


def device_of(pool):
    return "cpu" if pool.backend == "gloo" else torch.cuda.get_device_name()


def config_of(degree="auto", **runtime) -> DistAttnConfig:
    return DistAttnConfig(
        overlap_config=OverlapConfig(degree=degree, min_chunk_size=4),
        runtime_config=RuntimeConfig(sink_grad_reduce="sum", check_plan_timeout=10, **runtime),
    )


def start(folder, measure=True):
    """Begin as a new process would, with a cache folder."""
    os.environ["MAGI_ATTENTION_CACHE_DIR"] = str(folder)
    os.environ["MAGI_ATTENTION_MEASURE_RATES"] = "1" if measure else "0"
    rates_module._agreed.clear()
    clear_cache()


@contextlib.contextmanager
def heard(level=logging.INFO):
    """The messages that are logged meanwhile by what measures and keeps rates."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("magi_attention.runtime")
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


def options_planned(key):
    """The agreed rates of the key's group, and its number of stages."""
    ((_, rates),) = rates_module._agreed.items()
    return rates, len(find_manager(key).dist_attn_runtime.plan.stages)


def everyones(value):
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, value)
    return parts


def make_keys_twice(rank, world_size, folder):
    start(folder)
    case = Case(256, CAUSAL, world_size, config=config_of(), dtype=torch.bfloat16)
    with heard() as messages, mock.patch.object(rates_module, "measure_kernels", wraps=measure_kernels) as measured:
        first = options_planned(key_of(case, None))
        other = Case(192, SliceTable([[0, 192, 0, 192, 0]]), world_size, config=config_of())
        key_of(other, None)
        calls_in_process = measured.call_count
        start(folder)  # as a later process
        again = options_planned(key_of(case, None))
        calls_later = measured.call_count
    assert first == again
    assert len(set(map(repr, everyones(first)))) == 1
    return calls_in_process, calls_later, messages


def test_the_first_key_measures_once_and_later_processes_find_it(pool, tmp_path):
    answers = pool.run(make_keys_twice, tmp_path)
    assert [answer[:2] for answer in answers] == [(1, 1)] * pool.world_size
    ((line,), *others) = [answer[2] for answer in answers]
    assert line.startswith(f"measured rates of {device_of(pool)} on {pool.world_size} ranks")
    assert not any(others)
    (path,) = (tmp_path / "rates").iterdir()
    assert path.suffix == ".json"


def machine_for(key):
    per_node = count_ranks_per_node(key.cp_group, key.cp_mesh)
    return machine_of(layer_of(key), key.cp_group, "alltoall", per_node)


def make_key_with_own_file(rank, world_size, folder, rates_by_rank, spoil_first):
    start(folder / str(rank))
    # A degree that is given needs no rates.
    machine = machine_for(key_of(Case(256, CAUSAL, world_size, config=config_of(degree=1)), None))
    assert not rates_module._agreed
    if rates_by_rank[rank] is not None:
        save_rates(machine, rates_by_rank[rank])
    if spoil_first and rank == 0:
        rates_path(machine).write_text("{")
    with heard(logging.WARNING) as messages:
        found = options_planned(key_of(Case(256, CAUSAL, world_size, config=config_of()), None))
    return found, messages


def test_ranks_whose_files_differ_agree_on_the_first_ones(pool, tmp_path):
    rates_by_rank = [SLOW_LINKS, None, *[SLOW_LAUNCHES] * (pool.world_size - 2)]
    answers = pool.run(make_key_with_own_file, tmp_path, rates_by_rank, False)
    assert {repr(answer) for answer in answers} == {repr(answers[0])}
    (rates, num_stages), messages = answers[0]
    assert rates == SLOW_LINKS
    assert num_stages > 2
    assert not messages


def test_a_spoiled_file_is_measured_anew_with_one_warning(pool, tmp_path):
    answers = pool.run(make_key_with_own_file, tmp_path, [Rates()] * pool.world_size, True)
    found = [answer[0] for answer in answers]
    assert found == [found[0]] * pool.world_size
    assert found[0][0] != Rates()
    assert [len(answer[1]) for answer in answers] == [1] + [0] * (pool.world_size - 1)
    assert "are ignored" in answers[0][1][0]


def make_key_without_measuring(rank, world_size, folder):
    start(folder, measure=rank != 0)  # the first rank decides
    with mock.patch.object(rates_module, "measure_kernels", side_effect=AssertionError):
        rates, _ = options_planned(key_of(Case(256, CAUSAL, world_size, config=config_of()), None))
    return rates == default_rates(device_name(group_device(dist.group.WORLD)))


def test_without_measuring_defaults_hold(pool, tmp_path):
    assert pool.run(make_key_without_measuring, tmp_path) == [True] * pool.world_size
    assert not (tmp_path / "rates").exists()


def make_key_while_one_rank_fails_to_measure(rank, world_size, folder):
    start(folder)
    failing = {"side_effect": torch.OutOfMemoryError("no room")} if rank == 1 else {"wraps": measure_kernels}
    with mock.patch.object(rates_module, "measure_kernels", **failing), heard(logging.WARNING) as messages:
        rates, _ = options_planned(key_of(Case(256, CAUSAL, world_size, config=config_of()), None))
    return rates, messages


def test_a_rank_that_cannot_measure_leaves_all_with_defaults(pool, tmp_path):
    answers = pool.run(make_key_while_one_rank_fails_to_measure, tmp_path)
    assert {repr(rates) for rates, _ in answers} == {repr(default_rates(device_of(pool)))}
    assert all("{1: 'OutOfMemoryError: no room'}" in message for _, (message,) in answers)


def make_key_while_one_rank_fails_in_an_exchange(rank, world_size, folder):
    start(folder)
    failing = {"side_effect": RuntimeError("link down")} if rank == 1 else {"wraps": measure_links}
    begin = time.monotonic()
    with mock.patch.object(rates_module, "measure_links", **failing):
        try:
            options_planned(key_of(Case(256, CAUSAL, world_size, config=config_of()), None))
        except RuntimeError as error:
            return str(error), time.monotonic() - begin
    return "", 0.0


def test_a_rank_that_fails_while_links_are_measured_leaves_no_other_waiting(tmp_path):
    with RankPool(3, "gloo") as pool:  # of its own, as the group is of no use afterwards
        answers = pool.run(make_key_while_one_rank_fails_in_an_exchange, tmp_path)
    for message, seconds in answers:
        assert message == "measuring links failed on rank 1: RuntimeError: link down"
        assert seconds < 10


def make_keys_that_differ(rank, world_size, folder, degrees, bad_rank):
    start(folder, measure=False)
    slices = SliceTable([[0, 256, 0, 256, 1], [0, 256, 0, 256, 0]]) if rank == bad_rank else CAUSAL
    key_of(Case(256, slices, world_size, config=config_of(degrees[rank % 2])), None)


@pytest.mark.parametrize(
    ("degrees", "bad_rank", "message"),
    [(("auto", "auto"), 1, "keep a common"), (("auto", 2), None, "do not agree")],
)
def test_ranks_that_fail_or_want_no_rates_leave_none_waiting(pool, tmp_path, degrees, bad_rank, message):
    with pytest.raises(RankError, match=message) as error:
        pool.run(make_keys_that_differ, tmp_path, degrees, bad_rank, timeout_s=8)
    assert "failed too" in str(error.value)


def attend_with(rank, world_size, case, rates):
    group = group_of(case)
    if case.mesh_shape is None and rank >= case.cp:
        return None
    rates_module._agreed.clear()
    clear_cache()
    with mock.patch.object(rates_module, "load_rates", return_value=rates):
        answer = attend(case, group)
        num_stages = len(find_manager(key_of(case, group)).dist_attn_runtime.plan.stages)
    return (answer, num_stages) if rank == 0 else None


@pytest.mark.parametrize("rates", [SLOW_LINKS, SLOW_LAUNCHES], ids=["slow-links", "slow-launches"])
@pytest.mark.parametrize("cp", [1, 2, 4])
def test_answers_and_gradients_are_right(pool, cp, rates):
    slices = MASK_FAMILIES["random_tiling"](157, np.random.default_rng(cp))
    case = Case(157, slices, min(cp, pool.world_size), config=config_of(precision="fp64"), num_sinks=1)
    answer, num_stages = pool.run(attend_with, case, rates)[0]
    assert_right(case, answer)
    if case.cp == 1:
        assert num_stages == 1
    else:
        assert num_stages == 2 if rates is SLOW_LAUNCHES else num_stages > 2


@pytest.mark.parametrize("rates", [SLOW_LINKS, SLOW_LAUNCHES], ids=["slow-links", "slow-launches"])
def test_queries_and_keys_of_two_sequences(pool, rates):
    slices = SliceTable([[0, 60, 0, 150, 1], [60, 131, 40, 257, 0]])
    config = config_of(precision="fp64")
    case = Case(131, slices, pool.world_size, config=config, total_k=257, num_sinks=1)
    answer, num_stages = pool.run(attend_with, case, rates)[0]
    assert_right(case, answer)
    assert num_stages == 2 if rates is SLOW_LAUNCHES else num_stages > 2


def test_two_hops(pool):
    if pool.world_size != 4:
        pytest.skip(f"a mesh of (2, 2) needs 4 ranks, there are {pool.world_size}")
    case = Case(256, CAUSAL, 4, config=config_of(hierarchical_comm=True), mesh_shape=(2, 2))
    measured = pool.run(measure_two_hops, case)
    assert measured == [measured[0]] * 4
    answer, num_stages = pool.run(attend_with, case, SLOW_LINKS)[0]
    assert_right(case, answer)
    assert num_stages > 2


def measure_two_hops(rank, world_size, case):
    start("/nowhere")
    with mock.patch.object(rates_module, "save_rates", return_value=None):
        rates, _ = options_planned(key_of(case, group_of(case)))
    assert rates.link_gbs != default_rates("cpu").link_gbs
    return rates


def test_one_process_measures_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("MAGI_ATTENTION_CACHE_DIR", str(tmp_path))
    case = Case(96, SliceTable([[0, 96, 0, 96, 1]]), config=config_of())
    assert_right(case, attend(case, None))
    assert list(Path(tmp_path).iterdir()) == []
