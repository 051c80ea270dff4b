# SPDX-License-Identifier: Apache-2.0
"""Group collectives in two hops over a 2-D mesh: between the nodes once per row, then inside each node."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from magi_attention.comm.alltoall import check_out, check_own_places, check_reduce
from magi_attention.comm.packing import put_all_rows, take_all_rows
from magi_attention.comm.protocol import GroupCollectives, ReduceOp, RowsThere, Work
from magi_attention.comm.reduction import averaged
from magi_attention.comm.routes import Places
from magi_attention.comm.streams import communication_stream, events_of, running_on
from magi_attention.comm.work import PendingWork, Result, StreamWork
from magi_attention.common.logsumexp import accumulation_dtype, merge_lse, rescale_weight
from magi_attention.plan.exchange import ExchangeTable, TwoHopExchange
from magi_attention.utils.tensors import in_memory
from magi_attention.utils.torch_modes import without_grad


class GroupCollectivesOfHop(GroupCollectives, Protocol):
    """What carries one hop, and the process group that it serves."""

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The group, beside whose streams the other hop runs."""


class HierarchicalCollectives:
    """Group cast and group reduce that send a row to each node only once.

    On CUDA both hops run beside the current stream. On the CPU the second hop starts in ``wait``, so all ranks must
    wait for their exchanges in the same order.

    Args:
        inter: of the ranks with this rank's place in their nodes, one per node.
        intra: of the ranks of this rank's node.
    """

    name = "hierarchical"
    needs_multiprocessors = True

    def __init__(self, inter: GroupCollectivesOfHop, intra: GroupCollectivesOfHop) -> None:
        self._inter, self._intra = inter, intra

    def sends_early(self, table: ExchangeTable | TwoHopExchange, device: torch.device) -> bool:
        """See :class:`~magi_attention.comm.protocol.GroupCollectives`: what crosses is added up before."""
        return False

    @without_grad
    def cast(
        self,
        tensors: Sequence[Tensor],
        table: ExchangeTable | TwoHopExchange,
        out: Sequence[Tensor] | None = None,
        own_places: Places | None = None,
        lend: bool = False,
    ) -> Work[list[Tensor]]:
        """See :class:`~magi_attention.comm.protocol.GroupCollectives`."""
        hops = _checked(table)
        tensors = [in_memory(x) for x in tensors]
        num_own = hops.inter.num_source
        received = receive_buffers(tensors, hops.num_received, out, own_places)
        held = [x.new_empty((hops.intra.num_source, *x.shape[1:])) for x in tensors]
        first = self._inter.cast(tensors, hops.inter, out=[x[num_own:] for x in held])

        @without_grad
        def pass_on() -> list[Tensor]:
            for own_and_relay, own in zip(held, tensors, strict=True):
                own_and_relay[:num_own].copy_(own)
            return self._intra.cast(held, hops.intra, out=received).wait()

        return then([first], self._intra, pass_on, [*tensors, *held, *received])

    @without_grad
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
        """See :class:`~magi_attention.comm.protocol.GroupCollectives`.

        A relay's sum (or merge) travels between the nodes in the partials' dtype.
        """
        hops = _checked(table)
        check_reduce(partials, into, op, partial_lse, into_lse)
        check_own_places(own_places, into, hops.num_received, op)
        partials = [in_memory(x) for x in partials]
        if own_places is not None:
            take_all_rows(into, own_places.rows, partials)
        if partial_lse is not None and into_lse is not None:
            return self._reduce_lse(partials[0], partial_lse, hops, into[0], into_lse)
        sent = [*partials]
        if op == "avg":  # the number of terms is a sum like any other
            sent.append(sent[0].new_ones(hops.num_received, dtype=torch.float32))
        sums = [_zeros_like_rows(partial, hops.intra.num_source) for partial in sent]
        first = self._intra.reduce(sent, hops.intra, sums)
        num_own = hops.inter.num_source

        @without_grad
        def pass_on() -> None:
            relay = [total[num_own:].to(partial.dtype) for total, partial in zip(sums, sent, strict=True)]
            own = [total[:num_own] for total in sums]
            self._inter.reduce(relay, hops.inter, own).wait()
            for target, total in zip(into, own, strict=False):
                is_float = target.is_floating_point()
                total = total + (target.to(accumulation_dtype(target, total)) if is_float else target)
                target.copy_(averaged(total, 1 + own[-1]) if op == "avg" else total)

        return then([first], self._inter, pass_on, [*sent, *sums, *into])

    def _reduce_lse(
        self, partial: Tensor, partial_lse: Tensor, hops: TwoHopExchange, into: Tensor, into_lse: Tensor
    ) -> Work[None]:
        out = _zeros_like_rows(partial, hops.intra.num_source)
        lse = _zeros_like_rows(partial_lse, hops.intra.num_source).fill_(-torch.inf)
        first = self._intra.reduce([partial], hops.intra, [out], "lse", partial_lse, lse)
        num_own = hops.inter.num_source

        @without_grad
        def pass_on() -> None:
            relay, relay_lse = out[num_own:].to(partial.dtype), lse[num_own:].to(partial_lse.dtype)
            own, own_lse = out[:num_own], lse[:num_own]
            self._inter.reduce([relay], hops.inter, [own], "lse", relay_lse, own_lse).wait()
            final_lse = merge_lse(into_lse, own_lse)
            old_share = into.to(own.dtype) * rescale_weight(into_lse, final_lse)[..., None]
            old_share.masked_fill_((into_lse == -torch.inf)[..., None], 0)
            into.copy_(old_share + own * rescale_weight(own_lse, final_lse)[..., None])
            into_lse.copy_(final_lse)

        return then([first], self._inter, pass_on, [partial, partial_lse, out, lse, into, into_lse])


def receive_buffers(
    tensors: Sequence[Tensor], num_received: int, out: Sequence[Tensor] | None, own_places: Places | None
) -> list[Tensor]:
    """What a cast of several hops receives in, which holds a rank's own rows already; see ``GroupCollectives.cast``."""
    if out is not None:
        check_out(out, tensors, num_received)
    received = [*(out or (x.new_empty((num_received, *x.shape[1:])) for x in tensors))]
    check_own_places(own_places, tensors, num_received)
    if own_places is not None:
        put_all_rows(received, own_places.rows, tensors)
    return received


def then(
    first: Sequence[Work[Any]],
    collectives: GroupCollectivesOfHop,
    last: Callable[[], Result],
    buffers: Sequence[Tensor],
) -> Work[Result]:
    """Run the last hop after what comes first: on CUDA on its own group's stream at once, on the CPU in ``wait``.

    Args:
        first: what is under way.
        collectives: of the last hop.
        last: enqueues it, and returns the result.
        buffers: what all of it reads or writes of the current stream's.
    """
    enqueued = [work for work in first if isinstance(work, StreamWork)]
    if not enqueued:

        def run() -> Result:
            for work in first:
                work.wait()
            return last()

        return PendingWork(None, run)
    device = buffers[0].device
    caller, stream = torch.cuda.current_stream(device), communication_stream(collectives.group, device)
    assert stream is not None
    with running_on(stream):
        for work in enqueued:
            work.precede(stream)
        events, packed = events_of(caller.device_index), enqueued[0].packed
        return StreamWork(stream, caller, last(), [*enqueued, *buffers], packed, events, owns_packed=False)


def _checked(table: ExchangeTable | TwoHopExchange) -> TwoHopExchange:
    if isinstance(table, ExchangeTable):
        raise TypeError("HierarchicalCollectives needs a two-hop exchange, not an exchange table")
    return table


def _zeros_like_rows(tensor: Tensor, num_rows: int) -> Tensor:
    dtype = accumulation_dtype(tensor) if tensor.is_floating_point() else tensor.dtype
    return tensor.new_zeros((num_rows, *tensor.shape[1:]), dtype=dtype)
