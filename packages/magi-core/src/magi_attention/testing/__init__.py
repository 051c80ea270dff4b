# SPDX-License-Identifier: Apache-2.0
"""What tests of attention need: a dense oracle, mask generators, error metrics, spawned ranks."""

from magi_attention.testing.metric import assert_close, assert_within_pytorch_error
from magi_attention.testing.oracle import dense_attention
from magi_attention.testing.parameterize import parameterize
from magi_attention.testing.ref_attn import ref_attn_func

__all__ = [
    "assert_close",
    "assert_within_pytorch_error",
    "dense_attention",
    "parameterize",
    "ref_attn_func",
]
