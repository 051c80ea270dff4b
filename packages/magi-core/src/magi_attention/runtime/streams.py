# SPDX-License-Identifier: Apache-2.0
"""What travels when: received rows ahead of the kernels that read them, partial gradients behind."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from magi_attention.comm.protocol import GroupCollectives, Work
from magi_attention.plan.build import Stage

# Exchanges whose rows are traveling or being read, and exchanges whose partial gradients are on their way home. Memory
# grows with both; less than two would leave nothing to travel while a kernel reads what came before.
MOST_FETCHED, MOST_RETURNING = 2, 2


class StageInputs(NamedTuple):
    """What a stage reads once its rows have arrived.

    Attributes:
        number: the stage's number.
        stage: the stage.
        queries: tensors of the query side, ``[tq, ...]``: the rank's own or, where queries travel, the visitors'.
        keys: ``[tk, hk, d]``.
        values: ``[tk, hk, dv]``.
    """

    number: int
    stage: Stage
    queries: Sequence[Tensor]
    keys: Tensor
    values: Tensor


def walk_stages(
    stages: Sequence[Stage], collectives: GroupCollectives, queries: Sequence[Tensor], k: Tensor, v: Tensor
) -> Iterator[StageInputs]:
    """Walk the stages; the next stages' rows travel while one is computed.

    Their exchanges are launched before the kernel of the stage. A stage that reads own rows alone reads them where they
    are; where it reads received rows too, these arrive behind a copy of the own ones. To free the rows of a stage
    before those of another are fetched, drop its inputs before asking for the next.

    Args:
        stages: the rank's stages.
        collectives: how rows travel.
        queries: the rank's tensors of the query side, all of which travel where queries do.
        k: the rank's keys.
        v: the rank's values.
    """
    to_fetch = deque((number, stage) for number, stage in enumerate(stages) if stage.exchange is not None)
    traveling: deque[_Fetch] = deque()

    def fetch_next() -> None:
        if to_fetch:
            number, stage = to_fetch.popleft()
            with record_function(f"magi: cast stage {number}"):
                traveling.append(_Fetch(stage, collectives, queries, k, v))

    fetch_next()
    if traveling:
        traveling[0].work.wait_packed()
    for _ in range(MOST_FETCHED - 1):
        fetch_next()
    for number, stage in enumerate(stages):
        if stage.exchange is None:
            yield StageInputs(number, stage, queries, k, v)
            continue
        fetch = traveling.popleft()
        if stage.queries_travel:
            yield StageInputs(number, stage, fetch.wait(), k, v)
        else:
            yield StageInputs(number, stage, queries, *fetch.wait())
        fetch.work.release()
        del fetch
        fetch_next()


class _Fetch:
    """The exchange that brings what a stage reads."""

    def __init__(
        self, stage: Stage, collectives: GroupCollectives, queries: Sequence[Tensor], k: Tensor, v: Tensor
    ) -> None:
        assert stage.exchange is not None
        self._with_own: list[Tensor] | None = None
        behind = None
        if stage.reads_own and not stage.queries_travel:
            self._with_own = [x.new_empty((len(x) + stage.num_received, *x.shape[1:])) for x in (k, v)]
            behind = [whole[len(k) :] for whole in self._with_own]
        self.work = collectives.cast(queries if stage.queries_travel else [k, v], stage.exchange, out=behind, lend=True)
        for own, whole in zip((k, v), self._with_own or (), strict=False):
            whole[: len(own)].copy_(own)

    def wait(self) -> list[Tensor]:
        """The received rows, or behind the rank's own where the stage reads those too."""
        received = self.work.wait()
        return received if self._with_own is None else self._with_own


class Returns:
    """Partial gradients on their way home, in the order of their stages.

    Args:
        collectives: how rows travel.
        dtype: in which they travel.
    """

    def __init__(self, collectives: GroupCollectives, dtype: torch.dtype) -> None:
        self._collectives, self._dtype = collectives, dtype
        self._waiting: tuple[int, Stage, list[Tensor], list[Tensor]] | None = None
        self._traveling: deque[Work[None]] = deque()

    def put(self, number: int, stage: Stage, partials: list[Tensor], into: list[Tensor]) -> None:
        """Let partials of a stage go home at the next ``send``."""
        self._waiting = number, stage, partials, into

    def send(self) -> None:
        """Launch what waits: once the rows that the next stages read have been fetched, before the next kernel."""
        if self._waiting is None:
            return
        number, stage, partials, into = self._waiting
        self._waiting = None
        assert stage.exchange is not None
        while len(self._traveling) >= MOST_RETURNING:
            self._traveling.popleft().wait()
        with record_function(f"magi: reduce stage {number}"):
            partials = [x.to(self._dtype) for x in partials]
            self._traveling.append(self._collectives.reduce(partials, stage.exchange, into))

    def finish(self) -> None:
        """Send what still waits, and wait for all."""
        self.send()
        while self._traveling:
            self._traveling.popleft().wait()
