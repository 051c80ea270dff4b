# SPDX-License-Identifier: Apache-2.0
"""What the tests of the API in one process share: a key of two documents, and tensors for it."""

import torch

from magi_attention.api import magi_attn_varlen_key
from magi_attention.common.slices import SliceTable

TOTAL, PADDED = 50, 56
SLICES = SliceTable([[0, 30, 0, 30, 1], [30, 50, 30, 50, 1]])


def documents_key():
    return magi_attn_varlen_key([0, 30, 50], [0, 30, 50], 4, 2, 8, 0, None, causal=True)


def qkv(rows, dtype=torch.float64, heads=(4, 2, 2), dims=(8, 8, 8)):
    generator = torch.Generator().manual_seed(rows)
    return [
        torch.randn(rows, h, d, generator=generator, dtype=torch.float64).to(dtype)
        for h, d in zip(heads, dims, strict=True)
    ]
