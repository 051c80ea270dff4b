# SPDX-License-Identifier: Apache-2.0
"""What the forward and the backward pass of one distributed attention have in common."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from magi_attention.comm.group import let_go_at_exit
from magi_attention.comm.protocol import GroupCollectives
from magi_attention.config import RuntimeConfig
from magi_attention.kernels.protocol import AttentionCall
from magi_attention.kernels.registry import BackendPair
from magi_attention.plan.build import Plan
from magi_attention.runtime.streams import StageInputs, walk_stages


@dataclass(frozen=True, eq=False)
class DistAttnRuntime:
    """A rank's plan with the means to carry it out.

    Attributes:
        plan: what this rank computes and exchanges.
        collectives: how rows travel.
        group: the context-parallel group; None for a group of this process alone.
        options: the key's resolved runtime configuration.
    """

    plan: Plan
    collectives: GroupCollectives
    group: dist.ProcessGroup | None
    options: RuntimeConfig

    def __post_init__(self) -> None:
        let_go_at_exit(self, "group")


@dataclass(frozen=True, eq=False)
class AttentionJob:
    """One call of a distributed attention: the runtime, the stages' backends and the call's own parameters."""

    runtime: DistAttnRuntime
    backends: Sequence[BackendPair]
    softmax_scale: float
    softcap: float
    max_logits: bool

    def call_for(self, number: int, *, backward: bool = False) -> AttentionCall:
        """The kernel call of the stage of that number."""
        options = self.runtime.options
        margin = options.backward_sm_margin if backward else options.forward_sm_margin
        return AttentionCall(
            slices=self.runtime.plan.kernel_work[number].slices,
            softmax_scale=self.softmax_scale,
            softcap=self.softcap,
            deterministic=bool(options.deterministic),
            max_logits=self.max_logits and not backward,
            sm_margin=margin or 0,
        )

    def walk(self, queries: Sequence[Tensor], k: Tensor, v: Tensor) -> Iterator[StageInputs]:
        """Walk the stages; the next stages' rows travel while one is computed. See :func:`walk_stages`.

        Args:
            queries: the rank's tensors of the query side, all of which travel where queries do.
            k: the rank's keys.
            v: the rank's values.
        """
        return walk_stages(self.runtime.plan.stages, self.runtime.collectives, queries, k, v)
