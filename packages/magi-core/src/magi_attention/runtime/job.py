# SPDX-License-Identifier: Apache-2.0
"""What the forward and the backward pass of one distributed attention have in common, resolved once for its shapes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from magi_attention.comm.group import let_go_at_exit
from magi_attention.comm.protocol import GroupCollectives
from magi_attention.comm.routes import Rows
from magi_attention.config import RuntimeConfig
from magi_attention.env.general import ffa_backward_sm_margin, ffa_forward_sm_margin
from magi_attention.kernels.protocol import (
    AttentionCall,
    AttentionRequest,
    Direction,
    FinishesKeysFirst,
    MergesInPlace,
    WritesInPlace,
)
from magi_attention.kernels.registry import backends_for_slices
from magi_attention.plan.build import Plan
from magi_attention.runtime.costs import PassCosts
from magi_attention.runtime.schedule import make_schedule
from magi_attention.runtime.steps import KernelCall, Pass, Runs, Schedule, Step
from magi_attention.utils.torch_modes import outside_inference_mode

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
            job = self._jobs[asked] = _make_job(self, q, k, v, softmax_scale, softcap, max_logits)
        return job

    @property
    def jobs(self) -> list["AttentionJob"]:
        """What was asked for so far."""
        return list(self._jobs.values())

    def forget_tables(self) -> None:
        """Drop what takes memory on devices and can be derived again."""
        self._jobs.clear()
        if "schedule" in self.__dict__:
            for of in (self.schedule.forward, self.schedule.backward, self.schedule.backward_with_rows):
                for step in of.steps:
                    for call in step.calls:
                        call.slices.forget_derived()
                    for table in step.exchange.tables if step.exchange else ():
                        table.forget_derived()


class Launch(NamedTuple):
    """A kernel, ready to be launched.

    Attributes:
        queries: its run of queries; None for all.
        keys: its run of the key buffer; None for all.
        call: mask and scores, as the backend wants them.
        run: the backend's method.
        run_into: the same, which writes out or dq where it is told to; None if the backend can't.
        run_onto: a forward pass that is merged where it is written; None if the backend can't.
        run_keys_first: ``run_into`` that says when gradients of keys are there, for a last kernel whose gradients go
            home, in a pass that fetches nothing and so need not give rows back before; else, or if the backend can't,
            None.
        queries_known: whether its results are added to those of earlier kernels.
        keys_known: the same for gradients of keys.
        is_main: whether it has the most pairs of those kernels of its step whose results are not added to earlier ones.
        name: for profiles.
    """

    queries: slice | None
    keys: slice | None
    call: AttentionCall
    run: Callable[..., Any]
    run_into: Callable[..., Any] | None
    run_onto: Callable[..., Any] | None
    run_keys_first: Callable[..., Any] | None
    queries_known: bool
    keys_known: bool
    is_main: bool
    name: str


class LaunchStep(NamedTuple):
    """A step with its kernels.

    Attributes:
        step: as scheduled.
        own_places: where own rows lie among received ones; None where they don't.
        launches: the kernels.
    """

    step: Step
    own_places: Rows | None
    launches: tuple[Launch, ...]


class LaunchPass(NamedTuple):
    """A pass with its kernels.

    Attributes:
        schedule: the pass as scheduled.
        steps: in their order.
    """

    schedule: Pass
    steps: tuple[LaunchStep, ...]


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


@outside_inference_mode
def _make_job(
    runtime: DistAttnRuntime,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None,
    softcap: float,
    max_logits: bool,
) -> AttentionJob:
    options, schedule = runtime.options, runtime.schedule
    deterministic = bool(options.deterministic)
    request = AttentionRequest.of_tensors(q, k, v, softcap=softcap, max_logits=max_logits, deterministic=deterministic)
    names = options.kernel_backend or "auto", options.kernel_backend_backward or "same"
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale

    def prepare(of: Pass, direction: Direction, *, fetches: bool = True) -> LaunchPass:
        is_forward = direction == "forward"

        def launch(step: Step, call: KernelCall, sm_margin: int, is_main: bool) -> Launch:
            ends_pass = step is of.steps[-1] and call is step.calls[-1]
            goes_home = ends_pass and not is_forward and not fetches and step.exchange is not None
            pair = backends_for_slices(call.slices, request, *names)
            backend = pair.forward if is_forward else pair.backward
            num_queries = step.exchange.num_received if step.queries_travel and step.exchange else len(q)
            num_keys = len(k) if step.reads_own_alone else step.num_keys
            asked = AttentionCall(
                slices=call.slices,
                softmax_scale=scale,
                softcap=softcap,
                deterministic=deterministic,
                max_logits=max_logits and is_forward,
                sm_margin=sm_margin,
            )
            return Launch(
                queries=None if call.queries.start == 0 and call.queries.stop >= num_queries else call.queries,
                keys=None if call.keys.start == 0 and call.keys.stop >= num_keys else call.keys,
                call=asked,
                run=getattr(backend, direction),
                run_into=getattr(backend, f"{direction}_into") if isinstance(backend, WritesInPlace) else None,
                run_onto=backend.forward_onto if is_forward and isinstance(backend, MergesInPlace) else None,
                run_keys_first=backend.backward_keys_first
                if goes_home and isinstance(backend, FinishesKeysFirst)
                else None,
                queries_known=call.queries_known,
                keys_known=call.keys_known,
                is_main=is_main,
                name=f"magi: attention stage {step.number}",
            )

        steps = []
        for number, step in enumerate(of.steps):
            travels = wants_room(of, number, is_forward, fetches)
            margin = _sm_margin(options, direction, travels and runtime.collectives.needs_multiprocessors)
            places = None if step.own_places is None else _rows_of(step.own_places, q.device)
            # A process alone may leave out padding, and with it whole runs of queries.
            calls = [call for call in step.calls if step.queries_travel or call.queries.start < len(q)]
            new = [call for call in calls if not call.queries_known]
            main = max(new, key=lambda call: call.slices.area(), default=None)
            steps.append(LaunchStep(step, places, tuple(launch(step, call, margin, call is main) for call in calls)))
        return LaunchPass(of, tuple(steps))

    return AttentionJob(
        num_ranks=runtime.plan.layout.num_ranks,
        collectives=runtime.collectives,
        group=runtime.group,
        options=options,
        forward=prepare(schedule.forward, "forward"),
        backward=prepare(schedule.backward, "backward"),
        backward_with_rows=prepare(schedule.backward_with_rows, "backward", fetches=False),
        max_logits=max_logits,
        keeps_received=bool(options.keep_received)
        and _takes_little(runtime.plan, k[:1].numel() + v[:1].numel(), q.shape[1] * (q.shape[2] + v.shape[2])),
    )


def wants_room(of: Pass, number: int, is_forward: bool, fetches: bool) -> bool:
    """Whether rows begin to travel while a step's kernels run: later steps' rows, or what earlier steps send back.

    The first exchange of a pass begins before all kernels, and has its multiprocessors when these come: the copy of own
    rows to their places among the received ones, which the kernels wait for, gives it the time to start.

    Args:
        of: the pass.
        number: the step's place in it.
        is_forward: whether it is a forward pass, in which only visiting queries' outputs are sent back.
        fetches: whether the pass fetches its steps' rows.
    """
    exchanges = [place for place, each in enumerate(of.steps) if each.exchange is not None]
    begins_before = bool(exchanges) and of.steps[exchanges[0]].own_places is not None
    begin_late = exchanges[begins_before:]
    return (fetches and any(place > number for place in begin_late)) or any(
        each.exchange is not None and (each.queries_travel or not is_forward) for each in of.steps[:number]
    )


def _sm_margin(options: RuntimeConfig, direction: Direction, are_wanted: bool) -> int:
    """Multiprocessors that a kernel leaves to others, given whether what travels beside it wants any."""
    is_forward = direction == "forward"
    chosen = options.forward_sm_margin if is_forward else options.backward_sm_margin
    if chosen is not None:
        return chosen
    if not are_wanted:
        return 0
    return ffa_forward_sm_margin() if is_forward else ffa_backward_sm_margin()


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


def _rows_of(places: Runs, device: torch.device) -> Rows:
    """The rows of a buffer where own rows lie, in the order of these: a slice if they are one run, else an index."""
    starts, lengths = places[:, 2], places[:, 1] - places[:, 0]
    rows = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and len(places) == 1:
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return torch.from_numpy(rows).to(device)
