# SPDX-License-Identifier: Apache-2.0
"""Rows that a transport lends: attention gives them back in time, and doesn't read them afterwards."""

from dataclasses import replace

import pytest
import torch

from magi_attention.api import calc_attn, dispatch
from magi_attention.comm import AllToAllCollectives
from magi_attention.common.slices import SliceTable
from magi_attention.config import DistAttnConfig, OverlapConfig, RuntimeConfig
from magi_attention.testing.distributed import RankPool
from tests.distributed.attention_case import Answer, Case, assert_right, attend, group_of, inputs_of, key_of

MOST_LENT = 2


class LendingCollectives(AllToAllCollectives):
    """Spoils what it lent once it is given back, and lends no more than may be lent."""

    num_lent = most_lent = num_casts = 0

    def cast(self, tensors, table, out=None, own_places=None, lend=False):
        work = super().cast(tensors, table, out, own_places)
        if not lend or out is not None:
            return work
        self.num_casts += 1
        self.num_lent += 1
        self.most_lent = max(self.most_lent, self.num_lent)
        return LentWork(work, self)


class LentWork:
    def __init__(self, work, owner: LendingCollectives) -> None:
        self.work, self.owner, self.is_lent = work, owner, True
        self.wait_packed = work.wait_packed

    def wait(self):
        assert self.is_lent
        return self.work.wait()

    def release(self) -> None:
        assert self.is_lent
        self.is_lent = False
        self.owner.num_lent -= 1
        for rows in self.work.wait():
            rows.fill_(torch.nan)


def attend_on_loan(rank: int, world_size: int, case: Case) -> Answer:
    lending: list[LendingCollectives] = []

    def make(group, mesh, config):
        lending.append(LendingCollectives(group))
        return lending[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("magi_attention.runtime.manager.make_collectives", make)
        answer = attend(case, group_of(case))
    (collectives,) = lending
    assert collectives.num_casts > 0
    assert collectives.num_lent == 0
    assert collectives.most_lent <= MOST_LENT
    return answer


@pytest.fixture(scope="module")
def pool():
    with RankPool(3) as pool:
        yield pool


@pytest.mark.parametrize("options", [{"degree": 1}, {"degree": 3}, {"degree": 1, "qo_comm": True}], ids=str)
def test_lent_rows_are_given_back_behind_their_last_use(pool, options):
    degree = options["degree"]
    runtime = {name: value for name, value in options.items() if name != "degree"}
    config = DistAttnConfig(
        overlap_config=OverlapConfig(degree=degree, min_chunk_size=8), runtime_config=RuntimeConfig(**runtime)
    )
    # Another number of tokens for each case, since a key that is known makes no collectives.
    total = 90 + 30 * len(str(options))
    slices = SliceTable([[0, total // 3, 0, total // 3, 0], [total // 3, total, 0, total, 1]])
    case = replace(Case(total, slices, cp=3), config=config)
    assert_right(case, pool.run(attend_on_loan, case)[0])


def fail_on_loan(rank: int, world_size: int, case: Case, where: str) -> None:
    """A kernel of the step that reads the first received rows fails, and somebody keeps the error."""
    lending: list[LendingCollectives] = []

    def make(group, mesh, config):
        lending.append(LendingCollectives(group))
        return lending[-1]

    def fail(*arguments):
        raise RuntimeError("out of memory")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("magi_attention.runtime.manager.make_collectives", make)
        attend(case, group_of(case))
        patch.setattr(where, fail)
        with pytest.raises(RuntimeError, match="out of memory") as kept:
            attend(case, group_of(case))
        assert lending[0].num_lent == 0
        assert kept.value.__traceback__ is not None


@pytest.mark.parametrize("where", ["forward._Results.compute", "backward._GradientSums.compute"])
def test_lent_rows_are_given_back_if_a_kernel_fails(pool, where):
    overlap = OverlapConfig(degree=3, min_chunk_size=8)
    config = DistAttnConfig(overlap_config=overlap, runtime_config=RuntimeConfig(keep_received=False))
    total = 210 + 30 * len(where)
    case = replace(Case(total, SliceTable([[0, total, 0, total, 1]]), cp=3), config=config)
    pool.run(fail_on_loan, case, f"magi_attention.runtime.{where}")


def attend_with_a_learnable_sink(rank: int, world_size: int, case: Case) -> list[int]:
    """How many casts lend without and with gradients."""
    lending: list[LendingCollectives] = []

    def make(group, mesh, config):
        lending.append(LendingCollectives(group))
        return lending[-1]

    counts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("magi_attention.runtime.manager.make_collectives", make)
        key = key_of(case, group_of(case))
        q, k, v, sink = inputs_of(case)[0]
        tensors = [dispatch(x, key) for x in (q, k, v)]
        for has_gradients in (False, True):
            before = lending[0].num_casts
            with torch.set_grad_enabled(has_gradients):
                calc_attn(*tensors, key, sink=sink.requires_grad_())
            counts.append(lending[0].num_casts - before)
    return counts


def test_only_what_gradients_need_is_kept(pool):
    config = DistAttnConfig(overlap_config=OverlapConfig(degree=1), runtime_config=RuntimeConfig(keep_received=True))
    slices = SliceTable([[0, 270, 0, 270, 0]])
    case = Case(270, slices, cp=3, config=config, num_heads_q=32, num_heads_kv=1, num_sinks=1)
    assert pool.run(attend_with_a_learnable_sink, case) == [[1, 0]] * 3
