# SPDX-License-Identifier: Apache-2.0
"""The kernels of each pass, ready to be launched: whose they are, on which rows, and what they leave to others."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from magi_attention.comm.routes import Places, places_of
from magi_attention.common.intervals import merge, subtract
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
from magi_attention.plan.exchange import ExchangeTable, TwoHopExchange
from magi_attention.runtime.steps import KernelCall, Pass, Runs, Step


class Launch(NamedTuple):
    """A kernel, ready to be launched.

    Attributes:
        queries: its run of queries; None for all.
        keys: its run of the key buffer; None for all.
        call: mask and scores, as the backend wants them.
        run: the backend's method.
        run_into: the same, which writes out and lse, or dq, where it is told to; None if the backend can't.
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

    def scored(self, softmax_scale: float, softcap: float) -> "Launch":
        """The same with other scores; there is a softcap, as before, or there is none."""
        return self._replace(call=replace(self.call, softmax_scale=softmax_scale, softcap=softcap))


class LaunchStep(NamedTuple):
    """A step with its kernels.

    Attributes:
        step: as scheduled.
        own_places: where own rows lie among received ones; None where they don't.
        launches: the kernels.
    """

    step: Step
    own_places: Places | None
    launches: tuple[Launch, ...]


class LaunchPass(NamedTuple):
    """A pass with its kernels.

    Attributes:
        schedule: the pass as scheduled.
        steps: in their order.
    """

    schedule: Pass
    steps: tuple[LaunchStep, ...]

    def scored(self, softmax_scale: float, softcap: float) -> "LaunchPass":
        """The same launches with other scores."""
        steps = (
            each._replace(launches=tuple(launch.scored(softmax_scale, softcap) for launch in each.launches))
            for each in self.steps
        )
        return self._replace(steps=tuple(steps))


@dataclass(frozen=True)
class Kernels:
    """Makes the launches of one attention.

    Attributes:
        options: the key's resolved runtime configuration.
        travel_takes_multiprocessors: whether exchanges need some for themselves.
        sends_early: see :class:`~magi_attention.comm.protocol.GroupCollectives`.
        request: what is asked of backends.
        softmax_scale: factor on q·k.
        softcap: if positive, scores are capped.
        num_queries: rows of q.
        num_keys: rows of k and v.
    """

    options: RuntimeConfig
    travel_takes_multiprocessors: bool
    sends_early: Callable[[ExchangeTable | TwoHopExchange, torch.device], bool]
    request: AttentionRequest
    softmax_scale: float
    softcap: float
    num_queries: int
    num_keys: int

    def of_pass(self, of: Pass, direction: Direction, *, fetches: bool = True) -> LaunchPass:
        """The launches of a pass, which fetches its steps' rows or has them from the forward pass.

        Raises:
            RuntimeError: no kernel backend can serve it.
        """
        return LaunchPass(of, tuple(self._of_step(of, n, direction, fetches) for n in range(len(of.steps))))

    def _of_step(self, of: Pass, number: int, direction: Direction, fetches: bool) -> LaunchStep:
        step, is_forward = of.steps[number], direction == "forward"
        travels = wants_room(of, number, is_forward, fetches)
        margin = _sm_margin(self.options, direction, travels and self.travel_takes_multiprocessors)
        places = None if step.own_places is None else _own_places(step.own_places, self.request.device)
        # A process alone may leave out padding, and with it whole runs of queries.
        calls = [call for call in step.calls if step.queries_travel or call.queries.start < self.num_queries]
        new = [call for call in calls if not call.queries_known]
        main = max(new, key=lambda call: call.slices.area(), default=None)
        goes_home = not is_forward and not fetches and step is of.steps[-1] and step.exchange is not None
        launches = (
            self._launch(step, call, direction, margin, call is main, goes_home and call is step.calls[-1])
            for call in calls
        )
        return LaunchStep(step, places, tuple(launches))

    def _launch(
        self, step: Step, call: KernelCall, direction: Direction, sm_margin: int, is_main: bool, keys_first: bool
    ) -> Launch:
        is_forward = direction == "forward"
        names = self.options.kernel_backend or "auto", self.options.kernel_backend_backward or "same"
        pair = backends_for_slices(call.slices, self.request, *names)
        backend = pair.forward if is_forward else pair.backward
        num_queries = step.exchange.num_received if step.queries_travel and step.exchange else self.num_queries
        num_keys = self.num_keys if step.reads_own_alone else step.num_keys
        reads_all_keys = call.keys.start == 0 and call.keys.stop >= num_keys
        run_keys_first = backend.backward_keys_first if keys_first and isinstance(backend, FinishesKeysFirst) else None
        sends_early = (
            run_keys_first is not None
            and not self.options.backward_high_precision_reduce  # else copies travel, made of all at once
            and reads_all_keys
            and len(step.calls) == 1
            and step.exchange is not None
            and self.sends_early(step.exchange, self.request.device)
        )
        return Launch(
            queries=None if call.queries.start == 0 and call.queries.stop >= num_queries else call.queries,
            keys=None if reads_all_keys else call.keys,
            call=AttentionCall(
                slices=call.slices,
                softmax_scale=self.softmax_scale,
                softcap=self.softcap,
                deterministic=self.request.deterministic,
                max_logits=self.request.max_logits and is_forward,
                sm_margin=sm_margin,
                first_keys=_received_runs(step) if sends_early else (),
            ),
            run=getattr(backend, direction),
            run_into=getattr(backend, f"{direction}_into") if isinstance(backend, WritesInPlace) else None,
            run_onto=backend.forward_onto if is_forward and isinstance(backend, MergesInPlace) else None,
            run_keys_first=run_keys_first,
            queries_known=call.queries_known,
            keys_known=call.keys_known,
            is_main=is_main,
            name=f"magi: attention stage {step.number}",
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


def _received_runs(step: Step) -> tuple[tuple[int, int], ...]:
    """The runs of a key buffer that are received, where own rows lie among them."""
    if step.own_places is None:
        return ()
    start, stop, place = step.own_places.T
    own = merge(np.column_stack([place, place + stop - start]))
    return tuple((first, end) for first, end in subtract(np.array([(0, step.num_keys)]), own).tolist())


def _own_places(runs: Runs, device: torch.device) -> Places:
    """Where in a buffer own rows lie, in the order of these."""
    lengths = runs[:, 1] - runs[:, 0]
    return places_of(np.column_stack([runs[:, 2], runs[:, 2] + lengths]), device)
