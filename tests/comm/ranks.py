# SPDX-License-Identifier: Apache-2.0
"""Ranks with a GPU each; where there are fewer GPUs, with one GPU for all of them."""

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from magi_attention.comm import AllToAllCollectives
from magi_attention.plan.exchange import ExchangeTable
from magi_attention.testing.distributed import RankPool
from magi_comm_grpcoll.capability import SHARING
from magi_comm_grpcoll.heap import reason_against_nvshmem
from magi_comm_grpcoll.kernels import LINKED_FATBINS, missing_kernels

# Why there is no transport "put" here.
NO_PUTS = missing_kernels(LINKED_FATBINS) or reason_against_nvshmem()


def backend_of(num_ranks: int) -> str:
    """NCCL, or gloo where ranks share a GPU, which NCCL refuses. Also lets them: processes spawned later inherit it."""
    if torch.cuda.device_count() >= num_ranks:
        return "nccl"
    os.environ[SHARING] = "1"
    return "gloo"


def make_pool(num_ranks: int) -> RankPool:
    return RankPool(num_ranks, backend_of(num_ranks))


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


class Reference:
    """All-to-all; over gloo with tensors of the host."""

    def __init__(self) -> None:
        self._collectives = AllToAllCollectives(dist.group.WORLD)
        self._device = torch.device("cpu") if dist.get_backend() == "gloo" else device()

    def cast(self, tensors: Sequence[Tensor], table: ExchangeTable) -> list[Tensor]:
        """What arrives."""
        work = self._collectives.cast([x.to(self._device) for x in tensors], table)
        return [x.to(device()) for x in work.wait()]

    def reduce(
        self,
        partials: Sequence[Tensor],
        table: ExchangeTable,
        into: Sequence[Tensor],
        op: str = "sum",
        partial_lse: Tensor | None = None,
        into_lse: Tensor | None = None,
    ) -> None:
        """Reduce onto ``into``, and ``into_lse``."""
        targets = [*into] if into_lse is None else [*into, into_lse]
        lse = None if partial_lse is None else partial_lse.to(self._device)
        here = [x.to(self._device) for x in targets]
        given = [x.to(self._device) for x in partials], table, here[: len(into)], op
        self._collectives.reduce(*given, lse, None if into_lse is None else here[-1]).wait()
        for target, result in zip(targets, here, strict=True):
            target.copy_(result)
