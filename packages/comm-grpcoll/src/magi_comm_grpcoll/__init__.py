# SPDX-License-Identifier: Apache-2.0
"""Group collectives over direct connections between GPUs: the transport ``native`` of MagiAttention."""

from magi_comm_grpcoll.collectives import NativeCollectives
from magi_comm_grpcoll.context import ContextOptions, GroupContext
from magi_comm_grpcoll.errors import CapacityError, NotNativeError, PeerTimeoutError, PlanMismatchError, SlotLentError

__all__ = [
    "CapacityError",
    "ContextOptions",
    "GroupContext",
    "NativeCollectives",
    "NotNativeError",
    "PeerTimeoutError",
    "PlanMismatchError",
    "SlotLentError",
]
