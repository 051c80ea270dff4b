# SPDX-License-Identifier: Apache-2.0
"""Helpers: lists, data types, seeds, cost factors, dense masks, process groups."""

import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from magi_attention import utils
from magi_attention.common import AttnRanges
from magi_attention.env import comm as comm_env

lengths = st.lists(st.integers(0, 9), max_size=6)


@given(lengths)
def test_lengths_and_cumulative_lengths(seqlens):
    cu_seqlens = utils.seqlens2cu_seqlens(seqlens)
    assert cu_seqlens == [sum(seqlens[:n]) for n in range(len(seqlens) + 1)]
    assert utils.cu_seqlens2seqlens(cu_seqlens) == seqlens


@given(st.permutations(range(7)))
def test_inverse_permutation(perm):
    inverse = utils.perm_idxs2unperm_idxs(perm)
    assert [perm[i] for i in inverse] == [inverse[i] for i in perm] == list(range(7))


@given(st.lists(st.integers(-5, 5), min_size=1))
def test_positions_of_sorted_least_and_greatest(values):
    order = utils.argsort(values)
    assert [values[i] for i in order] == sorted(values)
    assert sorted(order) == list(range(len(values)))
    assert utils.argsort(values, key=lambda v: -v) == utils.argsort([-v for v in values])
    assert utils.argmin(values) == values.index(min(values))
    assert utils.argmax(values) == values.index(max(values))
    assert [values[i] for i in utils.argsort(values, reverse=True)] == sorted(values, reverse=True)


def test_lists():
    assert utils.flatten_nested_list([[1, [2]], [], 3, [[4]]]) == [1, 2, 3, 4]
    assert utils.wrap_to_list(3, 2) == [3, 3]
    assert utils.wrap_to_list((1, 2), 5) == [1, 2]
    assert utils.transpose_matrix([[1, 2, 3], [4, 5, 6]]) == [[1, 4], [2, 5], [3, 6]]
    with pytest.raises(ValueError, match="zip"):
        utils.transpose_matrix([[1, 2], [3]])
    assert utils.is_list_value_all([2, 2], 2)
    assert not utils.is_list_value_all([2, 3], 2)
    assert utils.is_list_value_all([3, 3], just_same=True)
    assert not utils.is_list_value_all([3, 4], just_same=True)
    assert utils.is_list_value_any([1, 2], 2)
    assert not utils.is_list_value_any([1, 3], 2)
    assert utils.is_list_type_all([1, 2], int)
    assert not utils.is_list_type_all([1, "2"], int)
    assert not utils.is_list_type_all([1, "2"], just_same=True)


def test_data_types():
    assert utils.max_fp_dtype(torch.bfloat16, torch.float16) is torch.float16
    assert utils.max_fp_dtype(torch.float32, torch.float64, torch.float16) is torch.float64
    x = torch.ones(2, dtype=torch.float64)
    assert utils.to_higher_fp_dtype(x, torch.float32).dtype is torch.float64
    assert utils.to_higher_fp_dtype(x.half(), torch.float32).dtype is torch.float32


def test_seeds():
    assert utils.str2seed("a") == utils.str2seed("a") != utils.str2seed("b")
    assert 0 <= utils.str2seed("a") < 2**32

    def draw():
        return torch.rand(1).item(), random.random(), np.random.rand()

    utils.set_random_seed(7)
    first = draw()
    utils.set_random_seed(7)
    assert draw() == first
    utils.set_random_seed(7)
    with utils.sync_rng(3):
        inside = torch.rand(1)
    assert draw() == first
    with utils.sync_rng(3):
        assert torch.equal(torch.rand(1), inside)


def test_cost_factors():
    forward = utils.get_calc_cost_factor(8, 128, tflops=1e12, mfu=0.5)
    assert forward == pytest.approx(4 * 8 * 128 / 1e12 / 0.5 * 1e6)
    assert utils.get_calc_cost_factor(8, 128, 1e12, 0.5, is_fwd=False) == pytest.approx(2.5 * forward)
    row = utils.get_comm_cost_factor(2, 64, bandwidth=1e9, bwu=0.8, corr_factor=0.75, sec_ratio=1)
    assert row == pytest.approx(2 * 2 * 64 / 1e9 / 0.75 / 0.8)
    assert [utils.get_a2a_corr_factor(n) for n in (1, 2, 4)] == [1.0, 0.5, 0.75]


SIZE = 10
one_slice = st.tuples(
    st.integers(0, 6), st.integers(0, 4), st.integers(0, 6), st.integers(0, 4), st.integers(0, 3)
).map(lambda r: ((r[0], r[0] + r[1]), (r[2], r[2] + r[3]), r[4]))


@given(st.lists(one_slice, max_size=4))
def test_dense_masks_are_the_union_of_the_slices(slices):
    wanted = [[False] * SIZE for _ in range(SIZE)]
    for (q0, q1), (k0, k1), kind in slices:
        for i in range(q0, q1):
            for j in range(k0, k1):
                below = j <= i + k1 - q1 or not kind & 1
                above = j >= i + k0 - q0 or not kind & 2
                wanted[i][j] |= below and above
    q, k, kinds = [s[0] for s in slices], [s[1] for s in slices], [s[2] for s in slices]
    mask = utils.make_attn_mask_from_ffa_args(
        AttnRanges.from_ranges(q), AttnRanges.from_ranges(k), kinds, SIZE, SIZE, device="cpu"
    )
    assert mask.dtype is torch.bool
    assert mask.tolist() == wanted
    tensors = (torch.tensor(x, dtype=torch.int32).reshape(-1, 2) for x in (q, k))
    assert torch.equal(mask, utils.make_attn_mask_from_ffa_args(*tensors, torch.tensor(kinds).int(), SIZE, SIZE, "cpu"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([(0, 2)], [(0, 2)], [], 4, 4), "equally long"),
        (([(0, 2)], [(0, 2)], [5], 4, 4), "0 to 3"),
        (([(0, 5)], [(0, 2)], [0], 4, 4), "4 queries"),
        (([(2, 1)], [(0, 2)], [0], 4, 4), r"\[2, 1\)"),
    ],
)
def test_wrong_slices_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        utils.make_attn_mask_from_ffa_args(*arguments, device="cpu")


PROGRAM = """
import torch, torch.distributed as dist
from magi_attention.utils import clearup_dist_env, setup_dist_env

def main():  # a gloo group in a variable of the module would outlive the interpreter, and may abort it
    env = setup_dist_env(backend="gloo", base_seed=40, seed_bias=lambda rank: 10 * rank)
    rank, local_rank, world_size, num_nodes, num_local_ranks, world_group, device, seed = env
    x = torch.tensor([float(rank)])
    dist.all_reduce(x, group=world_group)
    print(rank, local_rank, world_size, num_nodes, num_local_ranks, device, seed, torch.initial_seed(), x.item())
    assert setup_dist_env(backend="gloo").world_group is world_group
    clearup_dist_env()
    print(dist.is_initialized())

main()
"""


def test_process_groups_from_a_launchers_variables(tmp_path):
    probe = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # takes a free port
    port = probe.port
    del probe
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    common |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env=common | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    shown = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], shown
    for rank, (out, _) in enumerate(shown):
        seed = 40 + 10 * rank
        assert out.split() == f"{rank} 0 2 2 1 cpu {seed} {seed} 1.0 False".split()


def test_ranks_of_a_node_without_a_launcher(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert comm_env.local_world_size() is None
    utils.clearup_dist_env()  # does nothing without a group
    assert not dist.is_initialized()
