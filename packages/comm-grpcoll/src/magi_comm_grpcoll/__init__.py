# SPDX-License-Identifier: Apache-2.0
"""Group collectives over NVLink and InfiniBand: the transport ``native`` of MagiAttention, not implemented yet."""

import torch
from torch.distributed import ProcessGroup

from magi_attention.kernels.protocol import Support

__all__ = ["NativeCollectives"]

REASON = "the native group collectives are not implemented yet: use 'alltoall', which runs on every process group"


class NativeCollectives:
    """The place that the native transport will take: it supports nothing and says so."""

    name = "native"

    def __init__(self, group: ProcessGroup) -> None:
        """Raise the ``RuntimeError`` that the answer of ``supports`` announces."""
        raise RuntimeError(REASON)

    @classmethod
    def supports(cls, device: torch.device) -> Support:
        """Answer no for every device, with the reason and the transport to use instead."""
        return Support(False, REASON)
