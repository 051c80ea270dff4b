# SPDX-License-Identifier: Apache-2.0
"""What the forward and the backward pass of one distributed attention have in common, resolved once for its shapes."""

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch.distributed as dist
from torch import Tensor

from magi_attention.comm.group import let_go_at_exit
from magi_attention.comm.protocol import GroupCollectives
from magi_attention.config import RuntimeConfig
from magi_attention.kernels.protocol import AttentionRequest
from magi_attention.plan.build import Plan
from magi_attention.runtime.costs import PassCosts
from magi_attention.runtime.launches import Kernels, LaunchPass
from magi_attention.runtime.schedule import make_schedule
from magi_attention.runtime.steps import Schedule
from magi_attention.utils.torch_modes import outside_inference_mode

MOST_JOBS = 256
"""Of a key: where scales or softcaps change from step to step, ever more are asked for."""

MOST_KEPT = 0.5
"""Received rows, with own ones among them, are kept for the backward pass if they take so much of what q and out do."""


@dataclass(frozen=True, eq=False)
class DistAttnRuntime:
    """A rank's plan with the means to carry it out.

    Attributes:
        plan: what this rank computes and exchanges.
        collectives: how rows travel.
        group: the context-parallel group; None for a group of this process alone.
        options: the key's resolved runtime configuration.
        costs: by which the plan's stages are arranged in either pass.
    """

    plan: Plan
    collectives: GroupCollectives
    group: dist.ProcessGroup | None
    options: RuntimeConfig
    costs: PassCosts
    _jobs: dict[object, "AttentionJob"] = field(default_factory=dict, repr=False)
    _first_jobs: dict[object, "AttentionJob"] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        let_go_at_exit(self, "group")

    @cached_property
    def schedule(self) -> Schedule:
        """Which kernels run when; arranged when it is first asked for."""
        return make_schedule(self.plan, self.costs)

    def job_for(
        self, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None, softcap: float, max_logits: bool
    ) -> "AttentionJob":
        """What to do for tensors like these, of the dtype to compute in; the same object for equal ones.

        Args:
            q: ``[tq, hq, d]``.
            k: ``[tk, hk, d]``.
            v: ``[tk, hk, dv]``.
            softmax_scale: factor on q·k; ``d ** -0.5`` for None.
            softcap: if positive, scores are capped.
            max_logits: whether the largest score per head is wanted.

        Raises:
            RuntimeError: no kernel backend can serve it.
        """
        asked = (q.shape, k.shape, v.shape, q.dtype, q.device, softmax_scale, softcap, max_logits)
        job = self._jobs.get(asked)
        if job is None:
            scale, softcap = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale), float(softcap)
            alike = (*asked[:5], softcap > 0, max_logits)
            first = self._first_jobs.get(alike)
            if first is None:
                job = self._first_jobs[alike] = _make_job(self, q, k, v, scale, softcap, max_logits)
            else:
                job = first.scored(scale, softcap)
            if len(self._jobs) >= MOST_JOBS:
                self._jobs.clear()
            self._jobs[asked] = job
        return job

    @property
    def jobs(self) -> list["AttentionJob"]:
        """What was asked for so far, of late if it was much."""
        return list(self._jobs.values())

    def forget_tables(self) -> None:
        """Drop what takes memory on devices and can be derived again."""
        self._jobs.clear()
        self._first_jobs.clear()
        if "schedule" in self.__dict__:
            for of in (self.schedule.forward, self.schedule.backward, self.schedule.backward_with_rows):
                for step in of.steps:
                    for call in step.calls:
                        call.slices.forget_derived()
                    for table in step.exchange.tables if step.exchange else ():
                        table.forget_derived()


@dataclass(frozen=True, eq=False)
class AttentionJob:
    """A distributed attention for tensors of certain shapes: everything that is the same in every call.

    Attributes:
        num_ranks: of the group.
        collectives: how rows travel.
        group: the context-parallel group; None for this process alone.
        options: the key's resolved runtime configuration.
        forward: the forward pass.
        backward: the backward pass.
        backward_with_rows: the backward pass where the forward pass kept what it received.
        max_logits: whether the largest scores are asked for.
        keeps_received: whether to keep it, so that the backward pass need not exchange it again; equal on all ranks.
    """

    num_ranks: int
    collectives: GroupCollectives
    group: dist.ProcessGroup | None
    options: RuntimeConfig
    forward: LaunchPass
    backward: LaunchPass
    backward_with_rows: LaunchPass
    max_logits: bool
    keeps_received: bool

    def __post_init__(self) -> None:
        let_go_at_exit(self, "group")

    @cached_property
    def queries_travel(self) -> bool:
        """Whether any queries are exchanged."""
        return any(each.step.queries_travel for each in self.forward.steps)

    def scored(self, softmax_scale: float, softcap: float) -> "AttentionJob":
        """The same of other scores: nothing else, of what is on devices least of all, is made anew."""
        return replace(
            self,
            forward=self.forward.scored(softmax_scale, softcap),
            backward=self.backward.scored(softmax_scale, softcap),
            backward_with_rows=self.backward_with_rows.scored(softmax_scale, softcap),
        )


@outside_inference_mode
def _make_job(
    runtime: DistAttnRuntime,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    softcap: float,
    max_logits: bool,
) -> AttentionJob:
    options, schedule = runtime.options, runtime.schedule
    kernels = Kernels(
        options=options,
        travel_takes_multiprocessors=runtime.collectives.needs_multiprocessors,
        sends_early=runtime.collectives.sends_early,
        request=AttentionRequest.of_tensors(
            q, k, v, softcap=softcap, max_logits=max_logits, deterministic=bool(options.deterministic)
        ),
        softmax_scale=softmax_scale,
        softcap=softcap,
        num_queries=len(q),
        num_keys=len(k),
    )
    return AttentionJob(
        num_ranks=runtime.plan.layout.num_ranks,
        collectives=runtime.collectives,
        group=runtime.group,
        options=options,
        forward=kernels.of_pass(schedule.forward, "forward"),
        backward=kernels.of_pass(schedule.backward, "backward"),
        backward_with_rows=kernels.of_pass(schedule.backward_with_rows, "backward", fetches=False),
        max_logits=max_logits,
        keeps_received=bool(options.keep_received)
        and _takes_little(runtime.plan, k[:1].numel() + v[:1].numel(), q.shape[1] * (q.shape[2] + v.shape[2])),
    )


def _takes_little(plan: Plan, key_row: int, query_row: int) -> bool:
    """Whether the key rows of all steps together are few beside q and out, on the rank where they are the most.

    Args:
        plan: of any rank.
        key_row: numbers of a row of k and v.
        query_row: numbers of a row of q and out.
    """
    if any(stage.queries_travel for stage in plan.stages):
        return False
    rows = int(plan.key_layout.rows_per_rank.max()) + sum(stage.most_received for stage in plan.stages)
    return rows * key_row <= MOST_KEPT * int(plan.layout.rows_per_rank.max()) * query_row
