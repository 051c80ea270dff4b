# SPDX-License-Identifier: Apache-2.0
"""The fast kernels in a training's shapes, between GPUs: 128 head dims, grouped heads, thousands of tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from magi_attention.api import clear_cache
from magi_attention.comm.alltoall import AllToAllCollectives
from magi_attention.common import workloads
from magi_attention.config import DistAttnConfig, OverlapConfig, RuntimeConfig
from magi_attention.kernels.protocol import AttentionRequest
from magi_attention.kernels.registry import explain_choice
from magi_attention.runtime import manager
from magi_attention.runtime.beside import Beside
from magi_attention.runtime.streams import Returns
from magi_attention.testing.distributed import RankPool
from tests.core.test_schedule import COSTS, in_both_passes
from tests.distributed.attention_case import Answer, Case, assert_right, attend

TOKENS = 6144
HEADS, GROUPS, HEAD_DIM = 8, 1, 128
# By which a few queries are computed while rows travel, whatever they need, or many that need none of these.
EARLY = {name: in_both_passes(replace(COSTS[name], window=128)) for name in ("window first", "rest together")}
SLEEP = 3_000_000
MASKS = ["causal", "varlen_causal", "swa_causal_1024", "varlen_block_causal_4k", "shared_question"]


@pytest.fixture(scope="module", params=[pytest.param("nccl", marks=pytest.mark.gpu(2))])
def pool(request):
    with RankPool(2, request.param) as pool:
        yield pool


def skip_unless_served(backend: str) -> None:
    """Skip where the backend's package is missing, or where this GPU is not one of its own."""
    device = torch.device("cuda", 0)
    request = AttentionRequest(device, torch.bfloat16, HEADS, GROUPS, HEAD_DIM, HEAD_DIM)
    try:
        for direction in ("forward", "backward"):
            explain_choice(request.toward(direction), backend)
    except RuntimeError as error:
        pytest.skip(str(error))


def attend_once(rank: int, world_size: int, case: Case) -> Answer:
    return attend(case, dist.group.WORLD)


def training_case(
    backend: str,
    mask: str,
    degree: int,
    *,
    keep_received: bool,
    native: bool = False,
    tokens: int = TOKENS,
    heads: tuple[int, int] = (HEADS, GROUPS),
) -> Case:
    return Case(
        tokens,
        workloads.make(mask, tokens),
        cp=2,
        config=DistAttnConfig(
            overlap_config=OverlapConfig(degree=degree),
            runtime_config=RuntimeConfig(kernel_backend=backend, keep_received=keep_received, native_grpcoll=native),
        ),
        dtype=torch.bfloat16,
        num_heads_q=heads[0],
        num_heads_kv=heads[1],
        head_dim=HEAD_DIM,
        head_dim_v=HEAD_DIM,
        max_logits=False,
    )


@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("backend", ["auto", "hopper", "blackwell", "cudnn_flex"])
def test_training_shapes(pool, backend, mask, degree):
    skip_unless_served(backend)
    case = training_case(backend, mask, degree, keep_received=degree == 1)
    assert_right(case, pool.run(attend_once, case)[0], on="cuda")


def attend_sending_early(rank: int, world_size: int, case: Case, late: int | None) -> tuple[Answer, int, int]:
    """Also how often gradients could go home before all of them were there, and how often they did by all-to-all.

    One rank may be late with its kernels.
    """
    num_early, num_by_all_to_all, put, exchange = 0, 0, Returns.put, AllToAllCollectives._exchange

    def counting_put(self: Returns, *arguments: object) -> None:
        nonlocal num_early
        num_early += arguments[-1] is not None
        if rank == late:
            torch.cuda._sleep(SLEEP)
        put(self, *arguments)

    def counting_exchange(self: AllToAllCollectives, *arguments: object, goes_early: bool = False) -> object:
        nonlocal num_by_all_to_all
        num_by_all_to_all += goes_early
        return exchange(self, *arguments, goes_early=goes_early)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Returns, "put", counting_put)
        patch.setattr(AllToAllCollectives, "_exchange", counting_exchange)
        patch.setattr(manager, "_costs", lambda *_: in_both_passes(COSTS["together"], backward_regular=1e9))
        clear_cache(dist.group.WORLD)
        answers = [attend(case, dist.group.WORLD) for _ in range(5)]
        clear_cache(dist.group.WORLD)
    return answers[-1], num_early, num_by_all_to_all


def check_sent_early(pool: RankPool, case: Case, late: int | None, *, expected: bool = True) -> None:
    answers = pool.run(attend_sending_early, case, late)
    is_native = case.config.runtime_config.native_grpcoll
    assert any(num_early for _, num_early, _ in answers) == expected
    assert any(num_early for *_, num_early in answers) == (expected and not is_native)
    assert_right(case, answers[0][0], on="cuda")


@pytest.mark.parametrize("late", [None, 0, 1])
@pytest.mark.parametrize("mask", ["full", *MASKS])
def test_gradients_of_received_keys_go_home_natively_beside_the_kernel(pool, mask, late):
    skip_unless_served("hopper")
    check_sent_early(pool, training_case("hopper", mask, 1, keep_received=True, native=True), late)


@pytest.mark.parametrize("late", [None, 0, 1])
@pytest.mark.parametrize("mask", ["full", "causal", "varlen_causal"])
def test_gradients_of_received_keys_go_home_at_the_end_of_the_kernel(pool, mask, late):
    """Where transfers are kernels: those of full and causal masks, which are runs, but not those of documents."""
    skip_unless_served("hopper")
    case = training_case("hopper", mask, 1, keep_received=True)
    check_sent_early(pool, case, late, expected=mask != "varlen_causal")


@pytest.mark.parametrize("late", [None, 0, 1])
@pytest.mark.parametrize("native", [False, True])
def test_gradients_of_received_keys_go_home_beside_a_full_masks_last_kernel(pool, native, late):
    skip_unless_served("blackwell")
    how = {"native": native, "tokens": 1024, "heads": (192, 12)}  # of which eight are left for the last kernel
    check_sent_early(pool, training_case("blackwell", "full", 1, keep_received=True, **how), late)


def attend_with_one_late(rank: int, world_size: int, case: Case, costs: str, late: str) -> Answer:
    """Some queries are computed early; the GPU reaches these, or all others, only long after it could."""
    num_beside = 0
    after, now = Beside.after, Beside.now

    @contextmanager
    def sleep_and_launch(self: Beside, event: "torch.cuda.Event | None") -> Iterator[None]:
        nonlocal num_beside
        num_beside += self.is_used
        with after(self, event):
            if late == "early":
                torch.cuda._sleep(SLEEP)
            yield

    def mark_and_sleep(self: Beside) -> "torch.cuda.Event | None":
        event = now(self)
        if late == "rest":
            torch.cuda._sleep(SLEEP)
        return event

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manager, "_costs", lambda *_: EARLY[costs])
        patch.setattr(Beside, "after", sleep_and_launch)
        patch.setattr(Beside, "now", mark_and_sleep)
        clear_cache(dist.group.WORLD)  # a key of the same case may be there, of the real costs
        answer = attend(case, dist.group.WORLD)
        clear_cache(dist.group.WORLD)
    assert num_beside
    return answer


@pytest.mark.parametrize("late", ["early", "rest"])
@pytest.mark.parametrize(
    ("mask", "costs"),
    [("causal", "window first"), ("full", "window first"), ("varlen_causal", "rest together")],
)
@pytest.mark.parametrize("backend", ["auto", "hopper", "blackwell", "cudnn_flex"])
def test_early_queries_on_a_stream_of_their_own(pool, backend, mask, costs, late):
    skip_unless_served(backend)
    case = training_case(backend, mask, 1, keep_received=True)
    assert_right(case, pool.run(attend_with_one_late, case, costs, late)[0], on="cuda")
