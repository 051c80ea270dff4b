# SPDX-License-Identifier: Apache-2.0
"""The fast kernels in a training's shapes, between GPUs: 128 head dims, grouped heads, thousands of tokens."""

import pytest
import torch
import torch.distributed as dist

from magi_attention.common import workloads
from magi_attention.config import DistAttnConfig, OverlapConfig, RuntimeConfig
from magi_attention.kernels.protocol import AttentionRequest
from magi_attention.kernels.registry import explain_choice
from magi_attention.testing.distributed import RankPool
from tests.distributed.attention_case import Answer, Case, assert_right, attend

TOKENS = 6144
HEADS, GROUPS, HEAD_DIM = 8, 1, 128
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


@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("backend", ["auto", "hopper", "blackwell", "cudnn_flex"])
def test_training_shapes(pool, backend, mask, degree):
    skip_unless_served(backend)
    case = Case(
        TOKENS,
        workloads.make(mask, TOKENS),
        cp=2,
        config=DistAttnConfig(
            overlap_config=OverlapConfig(degree=degree),
            runtime_config=RuntimeConfig(kernel_backend=backend, keep_received=degree == 1),
        ),
        dtype=torch.bfloat16,
        num_heads_q=HEADS,
        num_heads_kv=GROUPS,
        head_dim=HEAD_DIM,
        head_dim_v=HEAD_DIM,
        max_logits=False,
    )
    assert_right(case, pool.run(attend_once, case)[0], on="cuda")
