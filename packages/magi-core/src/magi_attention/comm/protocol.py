# SPDX-License-Identifier: Apache-2.0
"""What a transport for group collectives must offer."""

from collections.abc import Callable, Sequence
from typing import Literal, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from magi_attention.comm.routes import Places
from magi_attention.plan.exchange import ExchangeTable, TwoHopExchange

ReduceOp = Literal["sum", "avg", "lse"]
RowsThere = Callable[["torch.cuda.Stream"], object]
"""Lets a stream wait until some rows are there."""

Result = TypeVar("Result", covariant=True)


class Work(Protocol[Result]):
    """A collective under way."""

    def wait_packed(self) -> None:
        """Let the current stream go on once the rows to send are gathered and nothing but the transfer is left.

        A kernel that is launched next then doesn't take all multiprocessors before the transfer, and what copies own
        rows beside it, can have the few that they need. Call it on the stream that the collective was called on.
        """

    def wait(self) -> Result:
        """Return the result once it may be used on the current stream; the host waits only for CPU tensors."""

    def release(self) -> None:
        """Give back a result that was lent: what has been enqueued on the current stream was the last to use it.

        A work that goes gives back what it lent. Does nothing if nothing was lent.
        """


@runtime_checkable
class GroupCollectives(Protocol):
    """Group cast and group reduce for one process group (or one 2-D mesh).

    Attributes:
        name: of the transport.
        needs_multiprocessors: whether its transfers on GPUs are kernels, for which others should leave some free.
    """

    name: str
    needs_multiprocessors: bool

    def sends_early(self, table: ExchangeTable | TwoHopExchange, device: torch.device) -> bool:
        """Whether a reduce of long rows by a table that is told of ``rows_there`` may begin when they are.

        Backends are asked to compute gradients of these rows before others only then. Ranks may differ.
        """

    def cast(
        self,
        tensors: Sequence[Tensor],
        table: ExchangeTable | TwoHopExchange,
        out: Sequence[Tensor] | None = None,
        own_places: Places | None = None,
        lend: bool = False,
    ) -> Work[list[Tensor]]:
        """Send rows of ``tensors``, each ``[num_source, ...]``, to the ranks that need them, in one exchange.

        Returns a work whose result is, for each tensor, ``[num_received, ...]`` of the same dtype: those of ``out``, if
        given, else new ones, of which each row is contiguous. The table need not name all their rows: with
        ``own_places``, the rank's own ``tensors`` are copied to these. Every rank of the group must call it with its
        own side of the same plan.

        With ``lend`` and without ``out`` they may lie in memory of the collectives, which saves a copy. They are then
        the caller's until the work's ``release``, which must come before the second cast after it, lending or not.
        """

    def reduce(
        self,
        partials: Sequence[Tensor],
        table: ExchangeTable | TwoHopExchange,
        into: Sequence[Tensor],
        op: ReduceOp = "sum",
        partial_lse: Tensor | None = None,
        into_lse: Tensor | None = None,
        own_places: Places | None = None,
        rows_there: RowsThere | None = None,
    ) -> Work[None]:
        """Bring ``partials``, each ``[num_received, ...]``, back to the rows' owners and combine them there.

        They are accumulated onto ``into``, each ``[num_source, ...]``, in place and in ascending order of the peers, so
        that the result has the same bits in every run. From the call until ``wait`` returns, ``into`` belongs to the
        collective: it may be written at any time. ``"avg"`` divides by the number of terms, the old value of
        ``into`` counting as one. ``"lse"`` takes one partial ``[num_received, heads, dim]`` with ``partial_lse``
        ``[num_received, heads]`` and merges by log-sum-exp into ``into[0]`` and ``into_lse``. Partials travel in their
        own dtype and are combined in at least float32.

        With ``own_places``, which ``"lse"`` doesn't take, ``into`` need not hold anything before: it first gets the
        rows of ``partials`` at these places, one for each of its own, while others travel.

        With ``rows_there``, all rows that the table names are there before what the current stream was given is over.
        Where they are sent as they lie, collectives may begin then; else they wait until that is over.
        """
