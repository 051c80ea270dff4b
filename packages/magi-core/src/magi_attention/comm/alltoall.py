# SPDX-License-Identifier: Apache-2.0
"""Group collectives by one ``all_to_all_single`` per exchange, on any backend of torch.distributed that has it."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from magi_attention.comm.group import group_size, let_go_at_exit
from magi_attention.comm.packing import pack, row_formats, unpack
from magi_attention.comm.protocol import ReduceOp, Work
from magi_attention.comm.reduction import add_partials, merge_partials_by_lse
from magi_attention.comm.routes import routes_of
from magi_attention.comm.work import PendingWork
from magi_attention.plan.exchange import ExchangeTable, TwoHopExchange


class AllToAllCollectives:
    """Group cast and group reduce over one process group.

    Tensors that are being sent must not change before ``wait`` returns: they need not have been copied.

    Args:
        group: the process group; None for this process alone.
    """

    name = "alltoall"

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        let_go_at_exit(self, "group")
        self.num_ranks = group_size(group)

    @torch.no_grad()
    def cast(self, tensors: Sequence[Tensor], table: ExchangeTable | TwoHopExchange) -> Work[list[Tensor]]:
        """See :class:`~magi_attention.comm.protocol.GroupCollectives`."""
        table = self._checked(table)
        _check_rows("tensors", tensors, table.num_source)
        routes = routes_of(table, tensors[0].device)
        packed = pack(tensors, routes.source, routes.num_sent)
        transfer, arrived = self._exchange(packed, routes.send_counts, routes.recv_counts)
        formats = row_formats(tensors)
        return PendingWork(
            transfer, lambda: [unpack(arrived, row, routes.packed) for row in formats], buffers=(packed, arrived)
        )

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
        """See :class:`~magi_attention.comm.protocol.GroupCollectives`."""
        table = self._checked(table)
        check_reduce(partials, into, op, partial_lse, into_lse)
        sent = [*partials] if partial_lse is None else [*partials, partial_lse]
        _check_rows("partials", sent, table.num_received)
        _check_rows("into", into, table.num_source)
        routes = routes_of(table, sent[0].device)
        packed = pack(sent, routes.received, table.num_received)
        transfer, arrived = self._exchange(packed, routes.recv_counts, routes.send_counts)
        formats = row_formats(sent)

        @torch.no_grad()
        def combine() -> None:
            if partial_lse is not None and into_lse is not None:
                merge_partials_by_lse(into[0], into_lse, arrived, formats[0], formats[1], routes)
                return
            for target, row in zip(into, formats, strict=True):
                add_partials(target, arrived, row, routes, average=op == "avg")

        return PendingWork(transfer, combine, buffers=(packed, arrived))

    def _exchange(
        self, packed: Tensor, send_counts: list[int], recv_counts: list[int]
    ) -> tuple[dist.Work | None, Tensor]:
        if self.num_ranks == 1:
            return None, packed.clone()  # a result never shares memory with what was sent
        arrived = packed.new_empty((sum(recv_counts), packed.shape[1]))
        transfer = dist.all_to_all_single(arrived, packed, recv_counts, send_counts, self.group, async_op=True)
        return transfer, arrived

    def _checked(self, table: ExchangeTable | TwoHopExchange) -> ExchangeTable:
        if isinstance(table, TwoHopExchange):
            raise TypeError("a two-hop exchange needs HierarchicalCollectives, not AllToAllCollectives")
        if table.num_ranks != self.num_ranks:
            raise ValueError(f"an exchange among {table.num_ranks} ranks can't run in a group of {self.num_ranks}")
        return table


def check_reduce(
    partials: Sequence[Tensor],
    into: Sequence[Tensor],
    op: ReduceOp,
    partial_lse: Tensor | None,
    into_lse: Tensor | None,
) -> None:
    """Raise ``ValueError`` for arguments of a group reduce that don't belong together."""
    if op not in ("sum", "avg", "lse"):
        raise ValueError(f"op must be 'sum', 'avg' or 'lse', not {op!r}")
    if len(partials) != len(into):
        raise ValueError(f"{len(partials)} partials can't be reduced into {len(into)} tensors")
    for partial, target in zip(partials, into, strict=True):
        if partial.shape[1:] != target.shape[1:]:
            raise ValueError(f"rows of shape {tuple(partial.shape[1:])} can't be reduced into {tuple(target.shape)}")
    if op == "lse" and (len(partials) != 1 or partial_lse is None or into_lse is None):
        raise ValueError("op 'lse' takes one partial, partial_lse and into_lse")
    if op != "lse" and not (partial_lse is None and into_lse is None):
        raise ValueError(f"only op 'lse' takes partial_lse and into_lse, not {op!r}")


def _check_rows(name: str, tensors: Sequence[Tensor], num_rows: int) -> None:
    if not tensors:
        raise ValueError(f"{name} must not be empty")
    for tensor in tensors:
        if len(tensor) != num_rows or tensor.device != tensors[0].device:
            raise ValueError(
                f"{name} must all have {num_rows} rows on {tensors[0].device}, "
                f"but one of them is {tuple(tensor.shape)} on {tensor.device}"
            )
