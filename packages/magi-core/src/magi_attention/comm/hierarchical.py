# SPDX-License-Identifier: Apache-2.0
"""Group collectives in two hops over a 2-D mesh: between the nodes once per row, then inside each node."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from magi_attention.comm.alltoall import AllToAllCollectives, check_reduce
from magi_attention.comm.protocol import ReduceOp, Work
from magi_attention.comm.work import PendingWork, Result
from magi_attention.common.logsumexp import accumulation_dtype, merge_lse, rescale_weight
from magi_attention.plan.exchange import ExchangeTable, TwoHopExchange


class HierarchicalCollectives:
    """Group cast and group reduce that send a row to each node only once.

    On CUDA both hops run beside the current stream. On the CPU the second hop starts in ``wait``, so all ranks must
    wait for their exchanges in the same order.

    Args:
        inter_group: the ranks with this rank's place in their nodes, one per node.
        intra_group: the ranks of this rank's node.
    """

    name = "hierarchical"

    def __init__(self, inter_group: dist.ProcessGroup, intra_group: dist.ProcessGroup) -> None:
        self._inter = AllToAllCollectives(inter_group)
        self._intra = AllToAllCollectives(intra_group)
        self._side_streams: dict[torch.device, torch.cuda.Stream] = {}

    @torch.no_grad()
    def cast(self, tensors: Sequence[Tensor], table: ExchangeTable | TwoHopExchange) -> Work[list[Tensor]]:
        """See :class:`~magi_attention.comm.protocol.GroupCollectives`."""
        hops = _checked(table)
        with self._beside(tensors):
            first = self._inter.cast(tensors, hops.inter)

        @torch.no_grad()
        def start_second() -> Work[list[Tensor]]:
            relay = first.wait()
            held = [torch.cat(pair) for pair in zip(tensors, relay, strict=True)]
            return self._intra.cast(held, hops.intra)

        return self._then(tensors, start_second, lambda received: received)

    @torch.no_grad()
    def reduce(
        self,
        partials: Sequence[Tensor],
        table: ExchangeTable | TwoHopExchange,
        into: Sequence[Tensor],
        op: ReduceOp = "sum",
        partial_lse: Tensor | None = None,
        into_lse: Tensor | None = None,
    ) -> Work[None]:
        """See :class:`~magi_attention.comm.protocol.GroupCollectives`.

        A relay's sum (or merge) travels between the nodes in the partials' dtype.
        """
        hops = _checked(table)
        check_reduce(partials, into, op, partial_lse, into_lse)
        if partial_lse is not None and into_lse is not None:
            return self._reduce_lse(partials[0], partial_lse, hops, into[0], into_lse)
        sent = [*partials]
        if op == "avg":  # the number of terms is a sum like any other
            sent.append(sent[0].new_ones(hops.num_received, dtype=torch.float32))
        with self._beside(sent):
            sums = [_zeros_like_rows(partial, hops.intra.num_source) for partial in sent]
            first = self._intra.reduce(sent, hops.intra, sums)

        @torch.no_grad()
        def start_second() -> Work[None]:
            first.wait()
            relay = [total[hops.inter.num_source :].to(p.dtype) for total, p in zip(sums, sent, strict=True)]
            return self._inter.reduce(relay, hops.inter, [total[: hops.inter.num_source] for total in sums])

        @torch.no_grad()
        def accumulate(_: None) -> None:
            own = [_on_current_stream(total[: hops.inter.num_source]) for total in sums]
            for target, total in zip(into, own, strict=False):
                if op == "avg":
                    terms = (1 + own[-1]).view(-1, *[1] * (target.dim() - 1))
                    target.copy_((target + total) / terms)
                else:
                    target.copy_(target + total)

        return self._then(sent, start_second, accumulate)

    def _reduce_lse(
        self, partial: Tensor, partial_lse: Tensor, hops: TwoHopExchange, into: Tensor, into_lse: Tensor
    ) -> Work[None]:
        with self._beside([partial, partial_lse]):
            out = _zeros_like_rows(partial, hops.intra.num_source)
            lse = _zeros_like_rows(partial_lse, hops.intra.num_source).fill_(-torch.inf)
            first = self._intra.reduce([partial], hops.intra, [out], "lse", partial_lse, lse)
        num_own = hops.inter.num_source

        @torch.no_grad()
        def start_second() -> Work[None]:
            first.wait()
            relay, relay_lse = out[num_own:].to(partial.dtype), lse[num_own:].to(partial_lse.dtype)
            return self._inter.reduce([relay], hops.inter, [out[:num_own]], "lse", relay_lse, lse[:num_own])

        @torch.no_grad()
        def merge(_: None) -> None:
            own, own_lse = _on_current_stream(out[:num_own]), _on_current_stream(lse[:num_own])
            final_lse = merge_lse(into_lse, own_lse)
            old_share = into.to(own.dtype) * rescale_weight(into_lse, final_lse)[..., None]
            old_share.masked_fill_((into_lse == -torch.inf)[..., None], 0)
            into.copy_(old_share + own * rescale_weight(own_lse, final_lse)[..., None])
            into_lse.copy_(final_lse)

        return self._then([partial, partial_lse], start_second, merge)

    @contextmanager
    def _beside(self, inputs: Sequence[Tensor]) -> Iterator[None]:
        """Run what follows beside the current stream, on the inputs as they are now there."""
        device = inputs[0].device
        if device.type != "cuda":
            yield
            return
        if device not in self._side_streams:
            self._side_streams[device] = torch.cuda.Stream(device)
        side = self._side_streams[device]
        side.wait_stream(torch.cuda.current_stream(device))
        for tensor in inputs:
            tensor.record_stream(side)
        with torch.cuda.stream(side):
            yield

    def _then(
        self, inputs: Sequence[Tensor], start_second: Callable[[], Work[Result]], finish: Callable[[Result], Result]
    ) -> Work[Result]:
        """Chain the second hop to the first: at once on CUDA, where waiting blocks only a stream, else in ``wait``."""
        if inputs[0].device.type != "cuda":
            return PendingWork(None, lambda: finish(start_second().wait()))
        side = self._side_streams[inputs[0].device]
        with torch.cuda.stream(side):
            second = start_second()
        started = side.record_event()

        def complete() -> Result:
            torch.cuda.current_stream(side.device).wait_event(started)
            return finish(second.wait())

        return PendingWork(None, complete)


def _checked(table: ExchangeTable | TwoHopExchange) -> TwoHopExchange:
    if isinstance(table, ExchangeTable):
        raise TypeError("HierarchicalCollectives needs a two-hop exchange, not an exchange table")
    return table


def _zeros_like_rows(tensor: Tensor, num_rows: int) -> Tensor:
    dtype = accumulation_dtype(tensor) if tensor.is_floating_point() else tensor.dtype
    return tensor.new_zeros((num_rows, *tensor.shape[1:]), dtype=dtype)


def _on_current_stream(tensor: Tensor) -> Tensor:
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return tensor
