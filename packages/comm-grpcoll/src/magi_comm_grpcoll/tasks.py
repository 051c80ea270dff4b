# SPDX-License-Identifier: Apache-2.0
"""What a kernel that moves pieces reads: tables of tasks on the GPU, one for each launch."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from magi_comm_grpcoll.tables import ByteCopies, cut, tasks_of

MOST_TENSORS = 4  # of one launch: the struct Sources of csrc/memory.cuh
_LEAST_BYTES, _PER_BLOCK = 1 << 15, 8


class LaunchPart(NamedTuple):
    """One launch's tasks.

    Attributes:
        first: the first of its tensors.
        tasks: uint8 on the GPU, entries of :data:`~magi_comm_grpcoll.tables.TASK`.
        is_last: whether no other launch of the exchange follows.
    """

    first: int
    tasks: torch.Tensor
    is_last: bool

    def bases_of(self, bases: Sequence[int]) -> Sequence[int]:
        """The addresses of its tensors, of those of all."""
        return bases[self.first : self.first + MOST_TENSORS]


def upload_tasks(
    copies: ByteCopies, num_blocks: int, most_bytes: int, stream: "torch.cuda.Stream", device: torch.device
) -> tuple[ByteCopies, list[LaunchPart]]:
    """Cut pieces to at most so many bytes, of which all blocks get their share, and bring them to the GPU on a stream.

    Nothing else may use them. Returns the cut pieces too.
    """
    share = int(copies.size.sum()) // (num_blocks * _PER_BLOCK)
    most = min(max(share, _LEAST_BYTES), most_bytes) // 16384 * 16384
    pieces = cut(copies, most)
    num_tensors = int(pieces.tensor.max(initial=0)) + 1
    parts = []
    with torch.cuda.stream(stream):
        for first, stop in pairwise([*range(0, num_tensors, MOST_TENSORS), num_tensors]):
            chosen = pieces.select((pieces.tensor >= first) & (pieces.tensor < stop))
            tasks = torch.from_numpy(tasks_of(chosen._replace(tensor=chosen.tensor - first)).view(np.uint8))
            uploaded = tasks.pin_memory().to(device, non_blocking=True)  # the host waits for nobody
            parts.append(LaunchPart(first, uploaded, stop == num_tensors))
    return pieces, parts
