# SPDX-License-Identifier: Apache-2.0
"""Group collectives among the GPUs of one host: this rank's slots, flags, streams and prepared exchanges."""

import logging
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import is_not
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from magi_attention.comm.alltoall import check_out, check_own_places, check_reduce
from magi_attention.comm.group import group_rank, group_size, let_go_at_exit
from magi_attention.comm.packing import RowFormat, row_formats, take_all_rows
from magi_attention.comm.protocol import ReduceOp, RowsThere
from magi_attention.comm.routes import Places, Rows
from magi_attention.comm.streams import EventPool, current_in_block, current_stream
from magi_attention.plan.exchange import ExchangeTable
from magi_attention.utils.tensors import in_memory
from magi_attention.utils.torch_modes import without_grad
from magi_comm_grpcoll.arena import Allocator, Arena, MappedAllocator
from magi_comm_grpcoll.capability import Needs, agree
from magi_comm_grpcoll.combine import Combination, check_combine
from magi_comm_grpcoll.errors import NotNativeError, PeerTimeoutError, first_line
from magi_comm_grpcoll.exchange import SlotExchange
from magi_comm_grpcoll.handshake import Handshake
from magi_comm_grpcoll.heap import FAREWELL_S, HeapAllocator, heap_of
from magi_comm_grpcoll.lane import Lane, Reduction, Round, Rounds
from magi_comm_grpcoll.own import own_rows
from magi_comm_grpcoll.plans import check_same_kind, gather_plans
from magi_comm_grpcoll.puts import PutWires, link_everywhere
from magi_comm_grpcoll.ring import Ring
from magi_comm_grpcoll.routes import Transport
from magi_comm_grpcoll.streams import let_streams_end, take_streams
from magi_comm_grpcoll.watchdog import RELEASED, Watchdog, Watched
from magi_comm_grpcoll.wires import WORD, DeviceWires, Words
from magi_comm_grpcoll.work import NativeWork

logger = logging.getLogger(__name__)

CAST, REDUCE = 0, 1
LANES = ("cast", "reduce")
_MAX_ROUNDS_OF_RELEASE = 1000


@dataclass(frozen=True)
class ContextOptions:
    """What can be chosen about a context; the same on all ranks.

    Attributes:
        transport: ``"copy_engine"``, ``"push"``, or None for the faster one for each exchange: to ranks of the same
            host. ``"put"``, by NVSHMEM, reaches other hosts too.
        num_slots: how many casts, and how many reduces, may hold rows at a time. Slots are used in turns, so those
            that come after a cast whose rows are still lent count too.
        timeout_s: seconds until a rank that does not do its part of an exchange is an error; None for the process
            group's own timeout, which always holds where the ranks talk on the host: here, and at first uses.
        capacity_bytes: the most memory that the slots may take, half for casts and half for reduces; None for no limit.
            An exchange that needs more goes in several rounds, each of which takes a slot while rows are lent.
        allocator: ``"torch"`` for PyTorch's symmetric memory, ``"nvshmem"`` for NVSHMEM's; None for the former unless
            the transport is ``"put"``, which needs the latter.
    """

    transport: Transport | None = None
    num_slots: int = 2
    timeout_s: float | None = None
    capacity_bytes: int | None = None
    allocator: Literal["torch", "nvshmem"] | None = None

    def __post_init__(self) -> None:
        if self.transport not in (None, "copy_engine", "push", "put"):
            raise ValueError(f"transport must be 'copy_engine', 'push', 'put' or None, not {self.transport!r}")
        if self.allocator not in (None, "torch", "nvshmem"):
            raise ValueError(f"allocator must be 'torch', 'nvshmem' or None, not {self.allocator!r}")
        if self.transport == "put" and self.allocator == "torch":
            raise ValueError("transport 'put' needs the memory of allocator 'nvshmem', not 'torch'")
        if self.num_slots < 1:
            raise ValueError(f"num_slots must be at least 1, not {self.num_slots}")
        if self.capacity_bytes is not None and Arena.most_in(self.capacity_bytes // len(LANES), self.num_areas) <= 0:
            raise ValueError(f"capacity_bytes gives none of {self.num_areas} slots 2 MiB: {self.capacity_bytes}")
        if self.timeout_s is not None and self.timeout_s <= 0:
            raise ValueError(f"timeout_s must be positive, not {self.timeout_s}")

    @property
    def is_staged(self) -> bool:
        """Whether rows are sent from a slot of their own: network adapters read no other memory."""
        return self.transport == "put"

    @property
    def num_areas(self) -> int:
        """Slots of casts, and of reduces, with that one."""
        return self.num_slots + self.is_staged


class GroupContext:
    """Group cast and group reduce over direct connections between the GPUs of one host, or by puts between hosts.

    Making one is a collective of the host, and so is the first run of every exchange table with tensors of some row
    format. Later runs only enqueue: neither the host nor the GPUs wait for all ranks. Calls can't be captured in a CUDA
    graph.

    Args:
        group: the process group, of at least two ranks, each with a GPU of its own, the current one.
        options: what can be chosen.

    Raises:
        NotNativeError: the GPUs can't.
    """

    name = "native"

    def __init__(self, group: dist.ProcessGroup, options: ContextOptions | None = None) -> None:
        self.options = options or ContextOptions()
        # Pushes by choice find some between attention kernels: see Round.start.
        self.needs_multiprocessors = self.options.transport in ("push", "put")
        self.group, self.rank, self.num_ranks = group, group_rank(group), group_size(group)
        let_go_at_exit(self, "group")
        index = torch.cuda.current_device() if torch.cuda.is_available() else None
        self.device = torch.device("cpu") if index is None else torch.device("cuda", index)
        self._index = index or 0
        timeout_s = self.options.timeout_s or group_timeout_s(group, self.device)
        self._handshake = Handshake(group, group_timeout_s(group, self.device))
        uses_heap = self.options.is_staged or self.options.allocator == "nvshmem"
        needs = Needs(nvshmem=uses_heap, one_host=not self.options.is_staged)
        if reason := agree(self._handshake, self.device, needs):
            raise NotNativeError(reason)
        self._streams = take_streams(self.device, len(LANES))
        self._allocator = self._make_allocator(uses_heap)
        self._error: PeerTimeoutError | None = None
        self._closed = False
        self._make_rings()
        rings = [Watched(name, progress) for name, progress in zip(LANES, self._progress.numpy(), strict=True)]
        self._watchdog = Watchdog(rings, weakref.ref(self), timeout_s)
        self._timeout_s = timeout_s
        most = self.options.capacity_bytes
        self._most_slot_bytes = None if most is None else Arena.most_in(most // len(LANES), self.options.num_areas)
        weakref.finalize(self, let_streams_end, self._streams, (self._lanes, self._progress)).atexit = False

    def _make_allocator(self, uses_heap: bool) -> Allocator:
        if not uses_heap:
            return MappedAllocator(self.device, self.group, self._handshake)
        ranks, crosses = dist.get_process_group_ranks(self.group), self.options.transport == "put"
        farewell = Handshake(self.group, FAREWELL_S)
        heap = heap_of(ranks, self.rank, self.device, self._handshake, farewell, crosses)
        if crosses:
            link_everywhere(self._handshake, self.device)
        return HeapAllocator(heap, self._handshake, self._streams.all)

    def _make_rings(self) -> None:
        num_rings, num_slots = len(LANES), self.options.num_slots
        num_bytes = num_rings * Words.num_bytes(self.num_ranks)
        self._control = self._allocator.allocate(num_bytes)
        self._control.local.zero_()
        # On the CPU whatever PyTorch's default device is: no other memory can be pinned.
        self._progress = torch.zeros(num_rings, 2, dtype=torch.int64, device="cpu", pin_memory=True)
        torch.cuda.synchronize(self.device)
        self._handshake.exchange(b"flags are zero")
        self._words = [Words(self.num_ranks, number) for number in range(num_rings)]
        self._lanes = []
        for number, words in enumerate(self._words):
            streams = self._streams.send, self._streams.arrive[number], self._streams.credit
            kind = PutWires if self.options.transport == "put" else DeviceWires
            wires = kind(self._control, words, self.rank, self._progress[number], *streams)
            events, arena = EventPool(), Arena(num_slots, self._allocator, self.options.is_staged)
            exchange = SlotExchange(Ring(num_slots), wires, events.put)
            self._lanes.append(Lane(exchange, wires, arena, self._control, self.rank, self.options.transport, events))

    def cast(
        self,
        tensors: Sequence[Tensor],
        table: ExchangeTable,
        out: Sequence[Tensor] | None = None,
        own_places: Places | None = None,
        lend: bool = False,
    ) -> NativeWork[list[Tensor]]:
        """See :class:`~magi_attention.comm.protocol.GroupCollectives`."""
        self._check_call()
        check_own_places(own_places, tensors, table.num_received)
        if out is not None:
            check_out(out, tensors, table.num_received)

        def prepare() -> Rounds:
            _check_rows("tensors", tensors, table.num_source, self.device)
            return self._prepare(CAST, table, row_formats(tensors))

        # What a call with the same arguments has checked and found holds for later ones.
        rounds = table.derived((self, CAST, *map(_kind, tensors)), prepare)
        lane, parts = self._lanes[CAST], rounds.parts
        self._make_room(lane, rounds.slot_bytes)
        lane.exchange.check_room(len(parts))
        caller, arrive = current_stream(self._index), lane.wires.arrive
        tensors = _contiguous(tensors)
        own = (
            None if own_places is None else own_rows(own_places, tensors, table.num_received, arrive, self.device, out)
        )
        if lend and out is None and len(parts) == 1:
            (part,) = parts
            epoch, packed = part.start(tensors, caller, own)
            lent = [*part.landed(epoch)]
            return part.work(epoch, packed, caller, lent, (part, tensors, own), self._check, lends=True)
        if out is not None:
            received = [*out]
        elif own is not None and own.copies is not None:
            received = own.copies.new_buffers()
        else:
            received = [x.new_empty((table.num_received, *x.shape[1:])) for x in tensors]
        packed = None
        with self._none_or_all(CAST, len(parts)):
            for number, part in enumerate(parts):
                epoch, begun = part.start(tensors, caller, None if number else own, received)
                packed = lane.later(packed, begun)
                arrive.wait_event(part.ready)
                try:
                    with torch.no_grad(), current_in_block(arrive, caller):
                        part.deliver(epoch, received)
                except BaseException:
                    lane.abandon(epoch, caller)
                    raise
                lane.release(epoch, arrive)
        return part.work(epoch, packed, caller, received, (parts, tensors, own, [*received]), self._check)

    def reduce(
        self,
        partials: Sequence[Tensor],
        table: ExchangeTable,
        into: Sequence[Tensor],
        op: ReduceOp = "sum",
        partial_lse: Tensor | None = None,
        into_lse: Tensor | None = None,
        own_places: Places | None = None,
        rows_there: RowsThere | None = None,
    ) -> NativeWork[None]:
        """See :class:`~magi_attention.comm.protocol.GroupCollectives`.

        Raises:
            TypeError: no kernel combines these dtypes; see :func:`~magi_comm_grpcoll.combine.can_combine`.
        """
        self._check_call()
        check_own_places(own_places, into, table.num_received, op)
        sent = [*partials] if partial_lse is None else [*partials, partial_lse]
        targets = [*into] if into_lse is None else [*into, into_lse]

        def prepare() -> Reduction:
            check_reduce(partials, into, op, partial_lse, into_lse)
            _check_rows("partials", sent, table.num_received, self.device)
            _check_rows("into", targets, table.num_source, self.device)
            check_combine(sent, targets, op)
            rounds = self._prepare(REDUCE, table, row_formats(sent))
            combine = partial(Combination, arrive, op, targets, [tensor.dtype for tensor in sent])
            return Reduction(rounds, [combine(part.segments) for part in rounds.parts])

        lane, arrive = self._lanes[REDUCE], self._lanes[REDUCE].wires.arrive
        kinds = *map(_kind, sent), len(sent) - len(partials), *map(_kind, targets), len(targets) - len(into)
        rounds, combinations = table.derived((self, REDUCE, op, *kinds), prepare)
        self._make_room(lane, rounds.slot_bytes)
        caller = current_stream(self._index)
        given, sent, written = sent, _contiguous(sent), _contiguous(targets)
        if any(map(is_not, given, sent)):
            rows_there = None  # those of the copies are there when the caller's stream has made them
        old_lse = [written[-1].detach().clone()] if op == "lse" else []
        addresses = [tensor.data_ptr() for tensor in (*written, *old_lse)]
        packed = None
        with self._none_or_all(REDUCE, len(rounds.parts)):
            for number, (part, combination) in enumerate(zip(rounds.parts, combinations, strict=True)):
                epoch, begun = part.start(sent, caller, rows_there=rows_there)
                packed = lane.later(packed, begun)
                try:
                    if own_places is not None and not number:
                        if packed is not None:
                            caller.wait_event(packed)
                        _take_own(written, own_places.rows, sent)
                        part.ready.record(caller)
                    arrive.wait_event(part.ready)
                    combination.enqueue(addresses, part.addresses(epoch))
                except BaseException:
                    lane.abandon(epoch, caller)
                    raise
                lane.release(epoch, arrive)
        if any(map(is_not, targets, written)):
            try:
                with torch.no_grad(), current_in_block(arrive, caller):
                    for target, result in zip(targets, written, strict=True):
                        if target is not result:
                            target.copy_(result)
            except BaseException:  # such as of a target whose rows share memory
                lane.let_finish(caller)
                raise
        kept = rounds.parts, old_lse, sent, written, targets, own_places
        return part.work(epoch, packed, caller, None, kept, self._check)

    def close(self) -> None:
        """Give the memory back. A collective of the host; waits until all that was enqueued is done."""
        self._quiesce(b"close")
        self._watchdog.stop()
        self._closed = True
        for lane in self._lanes:
            lane.let_go()
            lane.arena.memory = None
        self._allocator.free_unused()

    def _prepare(self, number: int, table: ExchangeTable, formats: tuple[RowFormat, ...]) -> Rounds:
        if table.num_ranks != self.num_ranks:
            raise ValueError(f"an exchange among {table.num_ranks} ranks can't run in a group of {self.num_ranks}")
        return table.derived((self, number, formats), lambda: self._plan(number, table, formats))

    def _plan(self, number: int, table: ExchangeTable, formats: tuple[RowFormat, ...]) -> Rounds:
        lane, most, is_staged = self._lanes[number], self._most_slot_bytes, self.options.is_staged
        # Kept by themselves: what follows may fail on this rank alone, which does not show its table again then.
        plans = table.derived(
            (self, number, formats, "plans"),
            lambda: gather_plans(self._handshake, LANES[number], table, formats, self.rank, most, is_staged),
        )
        slot_bytes = max(plan.slot_bytes for plan in plans)
        self._make_room(lane, slot_bytes)
        return Rounds([Round(plan, formats, lane, number == REDUCE) for plan in plans], slot_bytes)

    def _make_room(self, lane: Lane, slot_bytes: int) -> None:
        """Let slots hold so much, a collective if they don't: on all ranks alike, as their slots and sizes are.

        Those of exchanges that ran before may have gone with an attempt to make larger ones.
        """
        if not lane.arena.fits(slot_bytes):
            self._quiesce(b"grow")
            lane.let_go()
            lane.arena.grow(slot_bytes, self._most_slot_bytes)

    def _quiesce(self, why: bytes) -> None:
        """Wait until no rank has anything under way."""
        self._check()  # streams of a broken context need not end
        for stream in self._streams.all:
            stream.synchronize()
        self._check()
        check_same_kind(self._handshake.exchange(why), why)

    @contextmanager
    def _none_or_all(self, number: int, num_rounds: int) -> Iterator[None]:
        """A block that begins so many rounds of an exchange. After an error between them, refuse further calls.

        The other ranks wait for the rest, and would take what this one sends next for it.
        """
        exchange = self._lanes[number].exchange
        first = exchange.num_begun
        try:
            yield
        except BaseException:
            if 0 < exchange.num_begun - first < num_rounds:
                self._error = PeerTimeoutError(
                    f"a {LANES[number]} in {num_rounds} rounds failed on this rank after its first ones; this group "
                    "can't be used natively any more",
                    (self.rank,),
                )
            raise

    def _check(self) -> None:
        if self._error is not None:
            raise PeerTimeoutError(str(self._error), self._error.ranks)
        if self._closed:
            raise RuntimeError("the context is closed")

    def _check_call(self) -> None:
        self._check()
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "native group collectives can't be captured in a CUDA graph, since they are numbered: capture without "
                "them, or switch native_grpcoll off"
            )

    def give_up(self, number: int, epoch: int) -> None:
        """For the watchdog: name the ranks that are missing, refuse further calls, and free the streams."""
        self._error = self._timeout_of((), number, epoch)  # also if the GPU tells no more
        try:
            with torch.cuda.device(self.device), torch.cuda.stream(self._streams.watch):
                self._error = self._timeout_of(self._late(number, epoch), number, epoch)
                logger.error("%s", self._error)
                self._free_streams()
        except RuntimeError as error:
            logger.error("%s; what waits on its GPU can't be freed: %s", self._error, first_line(error))

    def _late(self, number: int, epoch: int) -> tuple[int, ...]:
        words, unit = self._words[number], self._lanes[number].wires.unit
        needed = [(words.arrived, (epoch + 1) * unit), (words.credit, max(0, epoch - self.options.num_slots + 1))]
        seen = self._control.local.cpu().numpy().view(np.int64)
        late = {rank for at, least in needed for rank in np.flatnonzero(seen[at // 8] < least).tolist()}
        return tuple(sorted(late - {self.rank}))  # whose own words are not all written

    def _timeout_of(self, ranks: tuple[int, ...], number: int, epoch: int) -> PeerTimeoutError:
        return PeerTimeoutError(
            f"{f'ranks {list(ranks)}' if ranks else 'some ranks'} of the group did not do their part of "
            f"{LANES[number]} number {epoch} within {self._timeout_s:g} s; this group can't be used natively any more",
            ranks,
        )

    def _free_streams(self) -> None:
        # Not what outboxes hold: copied to the others, it would let them take for arrived whatever never comes.
        awaited = [self._control.local[words.awaited] for words in self._words]
        freed = torch.full((len(awaited[0]) // WORD,), RELEASED, dtype=torch.int64, device="cpu").pin_memory()
        for _ in range(_MAX_ROUNDS_OF_RELEASE):  # a rank that comes late writes smaller numbers again
            for each in awaited:
                each.copy_(freed.view(torch.uint8), non_blocking=True)
            self._streams.watch.synchronize()
            time.sleep(0.01)
            if all(stream.query() for stream in self._streams.all):
                return


def group_timeout_s(group: dist.ProcessGroup, device: torch.device) -> float:
    """How long the collectives of a process group wait."""
    return float(group._get_backend(device).options._timeout.total_seconds())


def _contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x if x.is_contiguous() else x.detach().contiguous() for x in map(in_memory, tensors)]


@without_grad
def _take_own(targets: Sequence[Tensor], places: Rows, tensors: Sequence[Tensor]) -> None:
    take_all_rows(targets, places, tensors)


def _kind(tensor: Tensor) -> tuple[object, ...]:
    """All of a tensor that decides whether a call is right, and what it needs."""
    return tensor.dtype, tensor.shape, tensor.get_device()


def _check_rows(name: str, tensors: Sequence[Tensor], num_rows: int, device: torch.device) -> None:
    if not tensors:
        raise ValueError(f"{name} must not be empty")
    for tensor in tensors:
        if tensor.shape[:1] != (num_rows,) or tensor.device != device:
            raise ValueError(
                f"{name} must all have {num_rows} rows on {device}, "
                f"but one of them is {tuple(tensor.shape)} on {tensor.device}"
            )
