# SPDX-License-Identifier: Apache-2.0
"""Group collectives by one all-to-all per exchange, on any backend of torch.distributed that has it."""

from collections.abc import Callable, Sequence
from operator import is_not

import torch
import torch.distributed as dist
from torch import Tensor

from magi_attention.comm.group import group_size, let_go_at_exit
from magi_attention.comm.packing import (
    Pieces,
    RowLayout,
    can_lie_apart,
    deliver,
    lay_out,
    lay_out_apart,
    pack,
    packed_for_peers,
    put_all_rows,
    row_formats,
    runs_for_peers,
    take_all_rows,
)
from magi_attention.comm.protocol import ReduceOp, RowsThere
from magi_attention.comm.reduction import add_partials, merge_partials_by_lse
from magi_attention.comm.routes import Places, Routes, routes_of
from magi_attention.comm.streams import communication_stream, current_in_block, current_stream, events_of
from magi_attention.comm.work import PendingWork, Result, StreamWork
from magi_attention.plan.exchange import ExchangeTable, TwoHopExchange
from magi_attention.utils.tensors import in_memory
from magi_attention.utils.torch_modes import without_grad

_METHOD = "all_to_all_single" if hasattr(dist.ProcessGroup, "all_to_all_single") else "alltoall_base"


def _options(async_op: bool) -> dist.AllToAllOptions:
    options = dist.AllToAllOptions()
    options.asyncOp = async_op
    return options


_OPTIONS = {async_op: _options(async_op) for async_op in (False, True)}


class AllToAllCollectives:
    """Group cast and group reduce over one process group.

    Tensors that are being sent must not change before ``wait`` returns: they need not have been copied. CUDA tensors
    are packed, sent, unpacked and reduced on the group's :func:`~magi_attention.comm.streams.communication_stream`.

    Args:
        group: the process group; None for this process alone.
    """

    name = "alltoall"
    needs_multiprocessors = True

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        let_go_at_exit(self, "group")
        self.num_ranks = group_size(group)
        self._streams: dict[torch.device, torch.cuda.Stream | None] = {}
        self._sends_pieces: dict[torch.device, bool] = {}

    def sends_early(self, table: ExchangeTable | TwoHopExchange, device: torch.device) -> bool:
        """See :class:`~magi_attention.comm.protocol.GroupCollectives`."""
        if isinstance(table, TwoHopExchange) or not self._can_send_pieces(device):
            return False
        return routes_of(table, device).receives_runs

    @without_grad
    def cast(
        self,
        tensors: Sequence[Tensor],
        table: ExchangeTable | TwoHopExchange,
        out: Sequence[Tensor] | None = None,
        own_places: Places | None = None,
        lend: bool = False,
    ) -> PendingWork[list[Tensor]] | StreamWork[list[Tensor]]:
        """See :class:`~magi_attention.comm.protocol.GroupCollectives`."""
        check_own_places(own_places, tensors, table.num_received)
        tensors = [in_memory(x) for x in tensors]
        routes, layout = self._prepared(
            table, ("cast",), tensors, lambda checked: _check_rows("tensors", tensors, checked.num_source)
        )
        buffer = landed = None
        if out is None:
            buffer = tensors[0].new_empty((table.num_received, layout.num_words), dtype=torch.int64)
            received = layout.all_columns(buffer)
            if isinstance(routes.received, slice):
                landed = buffer[routes.received]
        else:
            check_out(out, tensors, table.num_received)
            received = [*out]
        is_in_place = landed is not None
        if landed is None:
            landed = tensors[0].new_empty((routes.num_arriving, layout.num_words), dtype=torch.int64)
        arrived = landed

        def gather() -> Tensor:
            return pack(tensors, routes.source, routes.num_sent, layout)

        def finish() -> list[Tensor]:
            if buffer is None:
                deliver(arrived, routes.received, layout, received)
            elif not is_in_place:
                put_all_rows([buffer], routes.received, [arrived])
            return received

        counts = routes.send_counts, routes.recv_counts
        work = self._exchange(gather, arrived, counts, finish, [routes, *tensors, *received])
        if own_places is not None:
            # While the others' rows travel, and not before: kernels that follow this copy would else take all
            # multiprocessors before the transfer has its own.
            work.wait_packed()
            put_all_rows(received, own_places.rows, tensors)
        return work

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
    ) -> PendingWork[None] | StreamWork[None]:
        """See :class:`~magi_attention.comm.protocol.GroupCollectives`."""
        given, partials = partials, [in_memory(x) for x in partials]
        sent = partials if partial_lse is None else [*partials, partial_lse]
        targets = [*into] if into_lse is None else [*into, into_lse]
        check_own_places(own_places, into, table.num_received, op)

        def check(checked: ExchangeTable) -> None:
            check_reduce(partials, into, op, partial_lse, into_lse)
            _check_rows("partials", sent, checked.num_received)
            _check_rows("into", targets, checked.num_source)

        asked = op, into_lse is None, len(partials), *[(each.dtype, each.shape, each.device) for each in targets]
        routes, layout = self._prepared(table, asked, sent, check, may_lie_apart=True)
        runs = runs_for_peers(sent, routes) if layout.is_apart else None
        if runs is None or any(map(is_not, given, partials)):
            rows_there = None  # copies are made when the caller's stream has all rows
        landed = self._landing(sent[0], routes.num_sent, layout, rows_there)

        def gather() -> Tensor | Pieces:
            if not layout.is_apart:
                return pack(sent, routes.received, routes.num_arriving, layout)
            pieces = packed_for_peers(sent, routes) if runs is None else runs
            return Pieces(pieces, layout.pieces(landed, routes.send_counts))

        def combine() -> None:
            if into_lse is not None:
                merge_partials_by_lse(into[0], into_lse, landed, layout, routes)
            else:
                add_partials(into, landed, layout, routes, average=op == "avg")

        counts = routes.recv_counts, routes.send_counts
        meanwhile = None if own_places is None else lambda: take_all_rows(into, own_places.rows, partials)
        kept, goes_early = [routes, *sent, *targets], rows_there is not None
        return self._exchange(gather, landed, counts, combine, kept, meanwhile, goes_early=goes_early)

    def _landing(self, like: Tensor, num_rows: int, layout: RowLayout, rows_there: RowsThere | None) -> Tensor:
        """Room for rows that arrive.

        If rows go early the group's stream waits for them now, and has the room: it may write there before the
        caller's stream is done with what lay there before.
        """
        stream = self._stream_on(like.device)
        if rows_there is None or stream is None:
            return like.new_empty((num_rows, layout.num_words), dtype=torch.int64)
        rows_there(stream)
        with current_in_block(stream, current_stream(like.get_device())):
            return like.new_empty((num_rows, layout.num_words), dtype=torch.int64)

    def _exchange(
        self,
        gather: Callable[[], Tensor | Pieces],
        landed: Tensor,
        counts: tuple[list[int], list[int]],
        finish: Callable[[], Result],
        kept: Sequence[object],
        meanwhile: Callable[[], None] | None = None,
        *,
        goes_early: bool = False,
    ) -> PendingWork[Result] | StreamWork[Result]:
        """Send what ``gather`` returns; ``finish`` makes the result of what has ``landed``.

        On CUDA all of it runs on the group's stream. On the CPU ``finish`` runs in ``wait``.

        Args:
            gather: packs the rows to send.
            landed: where to receive.
            counts: how many rows to send to and to receive from each peer.
            finish: computes the result from what arrived; called once.
            kept: what the exchange reads or writes, indices too, kept alive until it is over.
            meanwhile: run on the caller's stream while rows travel, before ``finish``; None for nothing.
            goes_early: whether the group's stream waits for the rows already, which are there before the caller's
                stream is done.
        """
        stream = self._stream_on(landed.device)
        if stream is None:
            packed = gather()
            transfer = self._send(packed, landed, counts, async_op=True)
            if meanwhile is not None:
                meanwhile()
            return PendingWork(transfer, without_grad(finish), buffers=(packed, landed, *kept))
        index = landed.get_device()
        caller, events = current_stream(index), events_of(index)
        if not goes_early:
            events.let_wait(stream, caller)
        torch.cuda.set_stream(stream)
        try:
            packed = gather()
            is_packed = events.take()
            is_packed.record(stream)
            # Not asynchronous, so that it runs on this very stream and with its priority; the host does not wait.
            self._send(packed, landed, counts, async_op=False)
            if meanwhile is not None:
                caller.wait_event(is_packed)
                with current_in_block(caller, stream):
                    meanwhile()
            if meanwhile is not None or goes_early:
                events.let_wait(stream, caller)
            return StreamWork(stream, caller, finish(), (landed, *kept), is_packed, events)
        except BaseException:
            events.let_wait(caller, stream)  # what was enqueued before the error uses tensors that may go now
            raise
        finally:
            torch.cuda.set_stream(caller)

    def _stream_on(self, device: torch.device) -> "torch.cuda.Stream | None":
        """The group's stream, found without asking the group for its name."""
        try:
            return self._streams[device]
        except KeyError:
            return self._streams.setdefault(device, communication_stream(self.group, device))

    def _send(
        self, packed: Tensor | Pieces, landed: Tensor, counts: tuple[list[int], list[int]], async_op: bool
    ) -> dist.Work | None:
        if isinstance(packed, Pieces):
            self._send_pieces(packed, landed.device)
            return None
        if self.num_ranks == 1:
            landed.copy_(packed)  # a result never shares memory with what was sent
            return None
        send, recv = counts
        # What dist.all_to_all_single does after checks that cost more than the rest; torch 2.13 renamed the method.
        work = getattr(self.group, _METHOD)(landed, packed, recv, send, _OPTIONS[async_op])
        if async_op or work is None:
            return work
        work.wait()
        return None

    def _can_send_pieces(self, device: torch.device) -> bool:
        """Whether the backend sends lists of tensors, several at a time; equal on all ranks."""
        if device not in self._sends_pieces:
            group = self.group if device.type == "cuda" and self.num_ranks > 1 else None
            self._sends_pieces[device] = group is not None and group._get_backend(device).name() == "nccl"
        return self._sends_pieces[device]

    def _send_pieces(self, pieces: Pieces, device: torch.device) -> None:
        """Send all of them by one kernel, on the current stream."""
        group = self.group
        assert group is not None
        group._start_coalescing(device)
        try:
            for sent, received in zip(*pieces, strict=True):
                group.alltoall(received, sent, _OPTIONS[False])
        finally:
            work = group._end_coalescing(device)
        if work is not None:
            work.wait()

    def _prepared(
        self,
        table: ExchangeTable | TwoHopExchange,
        asked: tuple[object, ...],
        sent: Sequence[Tensor],
        check: Callable[[ExchangeTable], None],
        may_lie_apart: bool = False,
    ) -> tuple[Routes, RowLayout]:
        """The routes of a table on a device and the layout of what is sent; checked once for all tensors of the shapes.

        Args:
            table: of the exchange.
            asked: what else ``check`` looks at.
            sent: tensors whose rows travel.
            check: raises for arguments that don't fit.
            may_lie_apart: whether tensors may lie apart where rows arrive, if the group can send them so.
        """
        if isinstance(table, TwoHopExchange):
            raise TypeError("a two-hop exchange needs HierarchicalCollectives, not AllToAllCollectives")

        def prepare() -> tuple[Routes, RowLayout]:
            if table.num_ranks != self.num_ranks:
                raise ValueError(f"an exchange among {table.num_ranks} ranks can't run in a group of {self.num_ranks}")
            check(table)
            routes, formats = routes_of(table, sent[0].device), row_formats(sent)
            if in_pieces and can_lie_apart(formats):
                return routes, lay_out_apart(formats, routes.num_sent)
            return routes, lay_out(formats)

        in_pieces = may_lie_apart and self._can_send_pieces(sent[0].device)
        key = self.num_ranks, in_pieces, asked, *[(each.dtype, each.shape, each.device) for each in sent]
        return table.derived(key, prepare)


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
    if op == "lse":
        if len(partials) != 1 or partial_lse is None or into_lse is None:
            raise ValueError("op 'lse' takes one partial, partial_lse and into_lse")
        for out, lse in ((partials[0], partial_lse), (into[0], into_lse)):
            if out.dim() != 3 or lse.shape != out.shape[:2]:
                raise ValueError(
                    f"op 'lse' takes tensors [rows, heads, dim] with an lse [rows, heads] each, not {tuple(out.shape)} "
                    f"with {tuple(lse.shape)}"
                )
    if op != "lse" and not (partial_lse is None and into_lse is None):
        raise ValueError(f"only op 'lse' takes partial_lse and into_lse, not {op!r}")


def check_own_places(
    own_places: Places | None, own: Sequence[Tensor], num_places: int, op: ReduceOp | None = None
) -> None:
    """Raise ``ValueError`` unless each row of this rank's own, which a reduce is ``into``, has one of the places."""
    if own_places is None:
        return
    if op == "lse":
        raise ValueError("op 'lse' takes no own_places: into and into_lse hold the rank's own results")
    if any(tensor.shape[0] != own_places.num_rows for tensor in own):
        shapes = [tuple(tensor.shape) for tensor in own]
        raise ValueError(f"there are {own_places.num_rows} own_places for rows of {shapes}")
    first, stop = own_places.bounds
    if first < 0 or stop > num_places:
        raise ValueError(f"own_places reach from row {first} to row {stop - 1}, but there are {num_places} rows")


def check_out(out: Sequence[Tensor], tensors: Sequence[Tensor], num_rows: int) -> None:
    """Raise ``ValueError`` unless rows of ``tensors`` can be received in ``out``."""
    if len(out) != len(tensors):
        raise ValueError(f"{len(tensors)} tensors can't be received in {len(out)}")
    for target, source in zip(out, tensors, strict=True):
        fits = target.shape == (num_rows, *source.shape[1:]) and target.dtype == source.dtype
        if not (fits and target.is_contiguous() and target.device == source.device):
            wanted = f"a contiguous {(num_rows, *source.shape[1:])} of {source.dtype} on {source.device}"
            raise ValueError(f"out must hold {wanted}, not {tuple(target.shape)} of {target.dtype} on {target.device}")


def _check_rows(name: str, tensors: Sequence[Tensor], num_rows: int) -> None:
    if not tensors:
        raise ValueError(f"{name} must not be empty")
    for tensor in tensors:
        if tensor.shape[:1] != (num_rows,) or tensor.device != tensors[0].device:
            raise ValueError(
                f"{name} must all have {num_rows} rows on {tensors[0].device}, "
                f"but one of them is {tuple(tensor.shape)} on {tensor.device}"
            )
