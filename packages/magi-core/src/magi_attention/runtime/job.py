# SPDX-License-Identifier: Apache-2.0
"""What the forward and the backward pass of one distributed attention have in common."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from magi_attention.comm.group import let_go_at_exit
from magi_attention.comm.protocol import GroupCollectives, Work
from magi_attention.config import RuntimeConfig
from magi_attention.kernels.protocol import AttentionCall
from magi_attention.kernels.registry import BackendPair
from magi_attention.plan.build import Plan, Stage


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


class StageInputs(NamedTuple):
    """What a stage reads once its rows have arrived.

    Attributes:
        stage: the stage.
        backends: what computes it.
        queries: tensors of the query side, ``[tq, ...]``: the rank's own or, where queries travel, the visitors'.
        keys: ``[tk, hk, d]``.
        values: ``[tk, hk, dv]``.
    """

    stage: Stage
    backends: BackendPair
    queries: Sequence[Tensor]
    keys: Tensor
    values: Tensor


@dataclass(frozen=True, eq=False)
class AttentionJob:
    """One call of a distributed attention: the runtime, the stages' backends and the call's own parameters."""

    runtime: DistAttnRuntime
    backends: Sequence[BackendPair]
    softmax_scale: float
    softcap: float
    max_logits: bool

    def call_for(self, stage: Stage, *, backward: bool = False) -> AttentionCall:
        """The kernel call of one stage."""
        options = self.runtime.options
        margin = options.backward_sm_margin if backward else options.forward_sm_margin
        return AttentionCall(
            slices=stage.slices,
            softmax_scale=self.softmax_scale,
            softcap=self.softcap,
            deterministic=bool(options.deterministic),
            max_logits=self.max_logits and not backward,
            sm_margin=margin or 0,
        )

    def walk(self, queries: Sequence[Tensor], k: Tensor, v: Tensor) -> Iterator[StageInputs]:
        """Walk the stages; the next stage's rows travel while one is computed.

        Args:
            queries: the rank's tensors of the query side, all of which travel where queries do.
            k: the rank's keys.
            v: the rank's values.
        """
        stages = self.runtime.plan.stages
        traveling = self._start_cast(stages[0], queries, k, v)
        for stage, backends, following in zip(stages, self.backends, [*stages[1:], None], strict=True):
            arriving = traveling
            if following is not None:
                traveling = self._start_cast(following, queries, k, v)
            arrived = None if arriving is None else arriving.wait()
            if arrived is None:
                yield StageInputs(stage, backends, queries, k, v)
            elif stage.queries_travel:
                yield StageInputs(stage, backends, arrived, k, v)
            elif stage.reads_own:
                yield StageInputs(stage, backends, queries, torch.cat([k, arrived[0]]), torch.cat([v, arrived[1]]))
            else:
                yield StageInputs(stage, backends, queries, *arrived)

    def _start_cast(self, stage: Stage, queries: Sequence[Tensor], k: Tensor, v: Tensor) -> Work[list[Tensor]] | None:
        if stage.exchange is None:
            return None
        return self.runtime.collectives.cast(queries if stage.queries_travel else [k, v], stage.exchange)
