# SPDX-License-Identifier: Apache-2.0
"""Small causal keys and random rows, for tests of the API over several ranks."""

import torch
import torch.distributed as dist

from magi_attention.api import DispatchConfig, DistAttnConfig, magi_attn_varlen_key
from magi_attention.config import RuntimeConfig

WORLD_SIZE = 4
SHARDS = {"even": (100, 7, False), "whole": (96, 4, False), "uneven": (101, 6, True), "tiny": (4, None, False)}


def causal_key(total, chunk_size=None, uneven=False, group=None, **runtime):
    config = DistAttnConfig(
        dispatch_config=DispatchConfig(chunk_size=chunk_size, uneven_shard=uneven),
        runtime_config=RuntimeConfig(**runtime),
    )
    return magi_attn_varlen_key([0, total], [0, total], 4, 2, 8, 0, group, causal=True, dist_attn_config=config)


def gathered(x):
    """All ranks' tensors, by plain torch.distributed."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, x)
    return parts


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
