# SPDX-License-Identifier: Apache-2.0
"""One kind of collective on one rank: its slots, its flags, its streams, and exchanges that are ready for them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor

from magi_attention.comm.packing import RowFormat, copy_rows, put_all_rows
from magi_attention.comm.protocol import RowsThere
from magi_attention.comm.routes import routes_of
from magi_attention.comm.streams import EventPool, current_in_block
from magi_comm_grpcoll.arena import Arena, SharedMemory
from magi_comm_grpcoll.combine import Combination, Segments
from magi_comm_grpcoll.exchange import Prepared, SlotExchange
from magi_comm_grpcoll.own import OwnRows, tensors_at
from magi_comm_grpcoll.plans import Plan
from magi_comm_grpcoll.routes import Transport, make_route
from magi_comm_grpcoll.wires import DeviceWires
from magi_comm_grpcoll.work import NativeWork, Result


@dataclass(frozen=True)
class Lane:
    """What all casts, or all reduces, of a context share.

    Attributes:
        exchange: the ring.
        wires: its flags.
        arena: its slots.
        control: every rank's control block.
        rank: this rank.
        transport: how pieces travel; None for the faster way for each exchange.
        events: to record; gets those back that the ring was given.
        rounds: what was prepared.
    """

    exchange: SlotExchange
    wires: DeviceWires
    arena: Arena
    control: SharedMemory
    rank: int
    transport: Transport | None
    events: EventPool
    rounds: "WeakSet[Round]" = field(default_factory=WeakSet)

    def let_go(self) -> None:
        """Let all prepared exchanges forget the slots, which nothing uses any more but tensors that were lent."""
        for each in self.rounds:
            each.let_go()

    def mark(self) -> "torch.cuda.Event":
        """An event that a launch may record; it refuses one that was never recorded, which has no handle."""
        event = self.events.take()
        if not event.cuda_event:
            event.record(self.wires.arrive)
        return event

    def release(self, epoch: int, reader: "torch.cuda.Stream") -> None:
        """Give an epoch's slot back to the senders behind what a stream has been given."""
        is_read = self.events.take()
        is_read.record(reader)
        self.exchange.release(epoch, is_read)

    def later(self, event: "torch.cuda.Event | None", recorded: "torch.cuda.Event | None") -> "torch.cuda.Event | None":
        """Of two events, if there are both, the one that was recorded later; the other one is given back."""
        if event is None or recorded is None:
            return recorded or event
        self.events.put(event)
        return recorded

    def abandon(self, epoch: int, caller: "torch.cuda.Stream") -> None:
        """The same after an error, so that the slot is not lost, and with the last one all further exchanges."""
        self.release(epoch, self.wires.arrive)
        self.let_finish(caller)

    def let_finish(self, caller: "torch.cuda.Stream") -> None:
        """Let the caller wait, after an error, for all that has been enqueued.

        It uses the caller's tensors, and there will be no work to keep them.
        """
        self.events.let_wait(caller, self.wires.send)
        self.events.let_wait(caller, self.wires.arrive)


class Rounds(NamedTuple):
    """All of an exchange.

    Attributes:
        parts: one after another.
        slot_bytes: what a slot must hold for any of them.
    """

    parts: "Sequence[Round]"
    slot_bytes: int


class Reduction(NamedTuple):
    """What reduces of tensors of given kinds need, made once.

    Attributes:
        rounds: the exchanges.
        combinations: of each, what combines its rows with those of the targets.
    """

    rounds: Rounds
    combinations: Sequence[Combination]


class Round:
    """A plan and its pieces with their addresses; these are found anew when the slots have moved.

    Whoever starts it sees to it that the slots fit.

    Args:
        plan: the plan.
        formats: of the tensors.
        lane: the plan's lane.
        is_reduce: whether what arrives is added up.

    Attributes:
        plan: the plan.
        slot_bytes: what a slot must hold, the same on all ranks.
        segments: of a reduce, which rows of the slot belong together.
        ready: recorded on the caller's stream before what is under way.
    """

    segments: Segments

    def __init__(self, plan: Plan, formats: tuple[RowFormat, ...], lane: Lane, is_reduce: bool) -> None:
        self.plan, self._formats, self._lane = plan, formats, lane
        self.slot_bytes = plan.slot_bytes
        self.let_go()
        lane.rounds.add(self)
        self.ready = torch.cuda.Event()  # recorded anew each time
        device = lane.control.local.device
        with torch.cuda.stream(lane.wires.arrive):  # which alone uses these, so that they may be dropped at any time
            self._landing = None if plan.landing is None else torch.from_numpy(plan.landing).to(device)
            if is_reduce:
                self.segments = Segments(*routes_of(plan.table, device).segments)
            else:
                self._num_named = sum(plan.table.recv_counts)
                whole = slice(0, self._num_named)
                self._named = whole if plan.names_all_rows else routes_of(plan.table, device).received

    def let_go(self) -> None:
        """Forget the slots; the next exchange finds those that there are then."""
        self._memory: SharedMemory | None = None
        self._transport: Transport | None = None
        self._bound: Prepared | None = None
        self._views: list[list[Tensor]] = []
        self._addresses: list[list[int]] = []

    def start(
        self,
        tensors: Sequence[Tensor],
        caller: "torch.cuda.Stream",
        own: OwnRows | None = None,
        received: Sequence[Tensor] | None = None,
        rows_there: RowsThere | None = None,
    ) -> "tuple[int, torch.cuda.Event | None]":
        """Enqueue what sends the tensors, and let the arriving stream wait for that and for what comes.

        Args:
            tensors: of the caller's stream.
            caller: the stream, which is the current one.
            own: are copied to their places while the others travel.
            received: where these are, of the caller's stream; None for the slot.
            rows_there: lets a stream wait for what is sent, where that is there before the caller's stream is.

        Returns:
            The epoch, and what is recorded when all kernels beside which others run have begun; None if there are none.
        """
        lane, packed = self._lane, None
        wires, exchange = lane.wires, lane.exchange
        try:
            bound = self._bound
            if bound is None or self._memory is not lane.arena.memory:
                bound = self._bind()
            self.ready.record(caller)
            if rows_there is None or self._transport != "copy_engine":  # a kernel finds room when the caller's are done
                wires.send.wait_event(self.ready)
            else:
                rows_there(wires.send)
            epoch = exchange.begin()
            if self._transport != "copy_engine":
                # The kernel needs multiprocessors, and shall have some before the next one takes them all.
                packed = lane.mark()
            exchange.send(bound, epoch, [tensor.data_ptr() for tensor in tensors], packed)
            try:
                if own is not None:
                    wires.arrive.wait_event(self.ready)
                    if received is None:
                        wires.await_own_credit(exchange.credit_needed(epoch))
                    packed = self._put_own(own, received or self.landed(epoch), caller, packed)
            except BaseException:
                exchange.arrive(bound, epoch)
                lane.release(epoch, wires.arrive)
                raise
            exchange.arrive(bound, epoch)
        except BaseException:
            lane.let_finish(caller)
            raise
        return epoch, packed

    def _put_own(
        self, own: OwnRows, targets: Sequence[Tensor], caller: "torch.cuda.Stream", packed: "torch.cuda.Event | None"
    ) -> "torch.cuda.Event | None":
        """Copy them on the arriving stream; returns what is recorded when all kernels have begun."""
        lane = self._lane
        if own.copies is None:
            with torch.no_grad(), current_in_block(lane.wires.arrive, caller):
                put_all_rows(targets, own.places.rows, own.tensors)
            return packed
        if packed is None:
            packed = lane.mark()
        else:
            lane.wires.arrive.wait_event(packed)
        own.copies.enqueue([tensor.data_ptr() for tensor in own.tensors], targets[0].data_ptr(), packed)
        return packed

    def work(
        self,
        epoch: int,
        packed: "torch.cuda.Event | None",
        caller: "torch.cuda.Stream",
        result: Result,
        buffers: Sequence[object],
        check: Callable[[], None],
        lends: bool = False,
    ) -> NativeWork[Result]:
        """A work for what has been enqueued."""
        lane = self._lane
        give_back = partial(lane.release, epoch) if lends else None
        return NativeWork(lane.wires.arrive, caller, result, buffers, packed, check, give_back, lane.events)

    def landed(self, epoch: int) -> Sequence[Tensor]:
        """``[num_rows, ...]``: what is in this rank's slot, tensor by tensor."""
        return self._views[epoch % len(self._views)]

    def addresses(self, epoch: int) -> Sequence[int]:
        """Where the tensors are in this rank's slot."""
        return self._addresses[epoch % len(self._addresses)]

    def deliver(self, epoch: int, received: Sequence[Tensor]) -> None:
        """Copy what a cast brought to the rows of the receive buffers that it belongs to, on the current stream."""
        landed = self.landed(epoch)
        if self._landing is not None:
            put_all_rows(received, self._landing, landed)
        else:
            copy_rows(received, landed, self._named, self._num_named)

    def _bind(self) -> Prepared:
        lane, memory = self._lane, self._lane.arena.memory
        assert memory is not None
        route, self._transport = make_route(
            self.plan.copies, lane.rank, lane.arena, lane.wires, lane.control, lane.transport
        )
        self._memory, self._bound = memory, Prepared(route, self.plan.sources)
        starts, slots = self.plan.layout.starts[lane.rank].tolist(), map(lane.arena.slot, range(lane.arena.num_slots))
        self._views = [tensors_at(slot, starts, self._formats, self.plan.num_rows) for slot in slots]
        self._addresses = [[view.data_ptr() for view in views] for views in self._views]
        return self._bound
