# SPDX-License-Identifier: Apache-2.0
"""What travels when: received rows ahead of the kernels that read them, partial gradients behind."""

from collections import deque
from collections.abc import Generator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from magi_attention.comm.protocol import GroupCollectives, RowsThere, Work
from magi_attention.comm.routes import Places
from magi_attention.runtime.launches import LaunchStep
from magi_attention.runtime.steps import Step
from magi_attention.utils.dtypes import as_dtype
from magi_attention.utils.profiling import named

# Exchanges whose rows are traveling or being read, and exchanges whose partial gradients are on their way home. Memory
# grows with both; less than two would leave nothing to travel while a kernel reads what came before.
MOST_FETCHED, MOST_RETURNING = 2, 2


class StepInputs(NamedTuple):
    """What a step's kernels read once its rows have arrived.

    Attributes:
        step: the step.
        queries: tensors of the query side, ``[tq, ...]``: the rank's own or, where queries travel, the visitors'.
        keys: ``[tk, hk, d]``.
        values: ``[tk, hk, dv]``.
    """

    step: LaunchStep
    queries: Sequence[Tensor]
    keys: Tensor
    values: Tensor


def walk_steps(
    steps: Sequence[LaunchStep],
    collectives: GroupCollectives,
    queries: Sequence[Tensor],
    k: Tensor,
    v: Tensor,
    kept: Sequence[Tensor] | None = None,
    *,
    lend: bool = True,
) -> Generator[StepInputs, None, None]:
    """Walk the steps; the next steps' rows travel while one is computed.

    Their exchanges are launched before the kernels of the step: behind these, which take every multiprocessor, they
    would begin when these end, and with them the kernels of all ranks that have nothing to compute before these rows
    come. A step that reads own rows alone reads them where they are; where it reads received rows too, these arrive
    among a copy of the own ones. To free the rows of a step before
    those of another are fetched, drop its inputs before asking for the next. Close the generator: if a kernel fails,
    what the collectives have lent is given back then, and not only when nobody holds the error any more.

    Args:
        steps: of one pass.
        collectives: how rows travel.
        queries: the rank's tensors of the query side, all of which travel where queries do.
        k: the rank's keys.
        v: the rank's values.
        kept: what the exchanges brought before, two tensors each; then there are none.
        lend: whether what they bring may lie in memory of the collectives, to be used only until the next step.
    """
    if kept is not None:
        pairs = iter(zip(kept[::2], kept[1::2], strict=True))
        for each in steps:
            yield StepInputs(each, queries, *((k, v) if each.step.exchange is None else next(pairs)))
        return
    to_fetch = deque(each for each in steps if each.step.exchange is not None)
    traveling: deque[Work[list[Tensor]]] = deque()

    def fetch_next() -> None:
        if to_fetch:
            step, places, _ = to_fetch.popleft()
            assert step.exchange is not None
            with named(f"magi: cast stage {step.number}"):
                tensors = queries if step.queries_travel else (k, v)
                traveling.append(collectives.cast(tensors, step.exchange, own_places=places, lend=lend))

    try:
        fetch_next()
        if traveling and steps[0].step.exchange is None:
            traveling[0].wait_packed()
        for _ in range(MOST_FETCHED - 1):
            fetch_next()
        for each in steps:
            if each.step.exchange is None:
                yield StepInputs(each, queries, k, v)
                continue
            if each.step.queries_travel:
                yield StepInputs(each, traveling[0].wait(), k, v)
            else:
                yield StepInputs(each, queries, *traveling[0].wait())
            traveling.popleft().release()
            fetch_next()
    finally:
        while traveling:
            traveling.popleft().release()


class Returns:
    """Partial gradients on their way home, in the order of their steps.

    Args:
        collectives: how rows travel.
        dtype: in which they travel.
    """

    def __init__(self, collectives: GroupCollectives, dtype: torch.dtype) -> None:
        self._collectives, self.dtype = collectives, dtype
        self._waiting: tuple[Step, list[Tensor], list[Tensor], Places | None, RowsThere | None] | None = None
        self._traveling: deque[Work[None]] = deque()

    def put(
        self,
        step: Step,
        partials: list[Tensor],
        into: list[Tensor],
        own_places: Places | None = None,
        rows_there: RowsThere | None = None,
    ) -> None:
        """Let partials of a step's key buffer, or of its visiting queries, go home at the next ``send``.

        Args:
            step: the step.
            partials: in the dtype in which they travel, if there are ``own_places``.
            into: what they are added to.
            own_places: of the rank's own among the partials, if ``into`` holds nothing yet.
            rows_there: lets a stream wait for the others, where they are there before the kernels are done.
        """
        self._waiting = step, partials, into, own_places, rows_there

    def send(self, *, before_kernels: bool = False) -> None:
        """Launch what waits, if anything does: once the rows that the next steps read have been fetched.

        Where the current stream is given kernels next, ``before_kernels``, these leave it the multiprocessors to begin,
        unless it comes after others that travel.
        """
        if self._waiting is None:
            return
        step, partials, into, own_places, rows_there = self._waiting
        self._waiting = None
        assert step.exchange is not None
        while len(self._traveling) >= MOST_RETURNING:
            self._traveling.popleft().wait()
        with named(f"magi: reduce stage {step.number}"):
            sent = [as_dtype(x, self.dtype) for x in partials]
            if sent[0] is not partials[0]:
                rows_there = None  # of the others
            work = self._collectives.reduce(sent, step.exchange, into, own_places=own_places, rows_there=rows_there)
            self._traveling.append(work)
        if before_kernels and len(self._traveling) == 1:
            work.wait_packed()

    def finish(self) -> None:
        """Send what still waits, and wait for all."""
        self.send()
        while self._traveling:
            self._traveling.popleft().wait()
