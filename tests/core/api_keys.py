# SPDX-License-Identifier: Apache-2.0
"""Keys for the tests of what keys hold and refuse."""

from magi_attention.api import AttnRanges, DispatchConfig, DistAttnConfig, magi_attn_flex_key


def ranges(*pairs):
    return AttnRanges.from_ranges(pairs)


def key_for(total=100, q=((0, 100),), k=None, types="causal", *, config=None, group=None, **more):
    arguments = {
        "q_ranges": ranges(*q),
        "k_ranges": ranges(*(q if k is None else k)),
        "attn_mask_type": types,
        "total_seqlen_q": total,
        "total_seqlen_k": total,
        "num_heads_q": 4,
        "num_heads_kv": 2,
        "head_dim": 64,
        "pad_size": 0,
        "cp_group_or_mesh": group,
        "dist_attn_config": config or DistAttnConfig(),
    }
    return magi_attn_flex_key(**(arguments | more))


def chunks(size, **more):
    return DistAttnConfig(dispatch_config=DispatchConfig(chunk_size=size, **more))
