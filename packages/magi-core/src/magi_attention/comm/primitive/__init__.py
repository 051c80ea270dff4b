# SPDX-License-Identifier: Apache-2.0
"""Collectives over tensors that are split unevenly, with plain lists of sizes."""

from magi_attention.comm.primitive.grpcoll import WorkWithPostProcessFn, exchange_of_splits, group_cast, group_reduce
from magi_attention.comm.primitive.uneven import all2all_v, all_gather_v, scatter_v

__all__ = [
    "WorkWithPostProcessFn",
    "all2all_v",
    "all_gather_v",
    "exchange_of_splits",
    "group_cast",
    "group_reduce",
    "scatter_v",
]
