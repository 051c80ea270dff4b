# SPDX-License-Identifier: Apache-2.0
"""Group collectives: rows travel only to the ranks that need them, and partial results back to the rows' owners."""

from magi_attention.comm.agreement import check_agreement
from magi_attention.comm.alltoall import AllToAllCollectives
from magi_attention.comm.hierarchical import HierarchicalCollectives
from magi_attention.comm.protocol import GroupCollectives, ReduceOp, Work
from magi_attention.comm.registry import make_collectives

__all__ = [
    "AllToAllCollectives",
    "GroupCollectives",
    "HierarchicalCollectives",
    "ReduceOp",
    "Work",
    "check_agreement",
    "make_collectives",
]
