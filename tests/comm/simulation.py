# SPDX-License-Identifier: Apache-2.0
"""Ranks, streams and flags as plain Python, run in any order that streams and waits allow."""

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

from magi_comm_grpcoll.exchange import Prepared, SlotExchange
from magi_comm_grpcoll.puts import UNIT
from magi_comm_grpcoll.ring import Ring
from magi_comm_grpcoll.routes import Route


@dataclass
class Event:
    """Something that has happened or not."""

    happened: bool = False


@dataclass
class Operation:
    """The head of a stream may run once it is ready."""

    is_ready: Callable[[], bool]
    run: Callable[[], None]


@dataclass
class Rank:
    """A GPU: streams, and words that others write."""

    number: int
    num_ranks: int
    num_slots: int
    streams: dict[str, deque[Operation]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.streams = {name: deque() for name in ("caller", "send", "arrive", "credit")}
        # What streams have copied or put, and is under way: these overtake each other.
        self.network: list[deque[Operation]] = []
        self.under_way: dict[str, list[deque[Operation]]] = {"send": [], "credit": []}
        self.outboxes = {"send": 0, "credit": 0}
        self.arrived, self.credit = [0] * self.num_ranks, [0] * self.num_ranks
        self.finished = self.num_sent = 0
        # What each source wrote to each slot.
        self.slots: list[dict[int, object]] = [{} for _ in range(self.num_slots)]

    def enqueue(self, stream: str, run: Callable[[], None], is_ready: Callable[[], bool] = lambda: True) -> None:
        self.streams[stream].append(Operation(is_ready, run))

    def all_queues(self) -> Iterator[deque[Operation]]:
        """Of which each is carried out in its order, and all beside each other."""
        return chain(self.streams.values(), self.network, *self.under_way.values())

    def copy(self, stream: str, *steps: Callable[[], None]) -> None:
        """Enqueue copies, which nothing orders before the next fence."""
        flights = [deque([Operation(lambda: True, step)]) for step in steps]
        self.enqueue(stream, lambda: self.under_way[stream].extend(flights))

    def write_behind_fence(self, stream: str, run: Callable[[], None]) -> None:
        """Enqueue a write of the stream's own, once all that it has copied before is there."""
        self.enqueue(stream, run, lambda: not any(self.under_way[stream]))

    def record(self, stream: str) -> Event:
        event = Event()
        self.enqueue(stream, lambda: setattr(event, "happened", True))
        return event

    def wait(self, stream: str, event: Event) -> None:
        self.enqueue(stream, lambda: None, lambda: event.happened)


class SimulatedWires:
    """The flags of a ring; copies from outboxes write those of the peers."""

    unit = 1

    def __init__(self, ranks: Sequence[Rank], me: int) -> None:
        self.ranks, self.me = ranks, ranks[me]

    def await_credit(self, credit: int, epoch: int) -> None:
        self.me.enqueue("send", lambda: None, lambda: min(self.me.credit) >= credit)

    def tell_arrival(self, epoch: int) -> None:
        def write() -> None:
            self.me.outboxes["send"] = self.me.arrived[self.me.number] = self.me.num_sent = epoch + 1

        self.me.write_behind_fence("send", write)
        self._send_letters("send", [peer.arrived for peer in self.ranks])

    def await_arrival(self, sources: tuple[int, ...], epoch: int) -> None:
        awaited = {*sources, self.me.number}
        self.me.enqueue(
            "arrive", lambda: None, lambda: all(self.me.arrived[s] >= (epoch + 1) * self.unit for s in awaited)
        )
        self.me.enqueue("arrive", lambda: setattr(self.me, "finished", epoch + 1))

    def tell_credit(self, credit: int, after: Event) -> None:
        def write() -> None:
            self.me.outboxes["credit"] = self.me.credit[self.me.number] = credit

        self.me.wait("credit", after)
        self.me.write_behind_fence("credit", write)
        self._send_letters("credit", [peer.credit for peer in self.ranks])

    def _send_letters(self, stream: str, words_of_ranks: Sequence[list[int]]) -> None:
        me = self.me.number

        def copy(words: list[int]) -> None:
            words[me] = self.me.outboxes[stream]

        self.me.copy(stream, *(partial(copy, words) for rank, words in enumerate(words_of_ranks) if rank != me))


class SimulatedPutWires(SimulatedWires):
    """Flags to which puts add."""

    unit = UNIT

    def tell_arrival(self, epoch: int) -> None:
        """Puts do it."""


class SimulatedPuts:
    """Puts two pieces to some peers, each with a signal; what is put overtakes what was put before."""

    NUM_PIECES = 2

    def __init__(self, wires: SimulatedPutWires, targets: Sequence[int], waits: bool = True) -> None:
        self.wires, self.targets, self.waits = wires, targets, waits

    def send(self, bases: Sequence[int], slot: int, epoch: int, begun: object = None) -> None:
        me, ranks = self.wires.me, self.wires.ranks

        def fly(*steps: Callable[[], None]) -> None:
            me.network.append(deque(Operation(lambda: True, step) for step in steps))

        def write(target: int, piece: int) -> None:
            found = ranks[target].slots[slot].get(me.number)
            pieces = found[1] if isinstance(found, tuple) and found[0] == epoch else set()
            ranks[target].slots[slot][me.number] = (epoch, pieces | {piece})
            if len(pieces) + 1 == self.NUM_PIECES:
                ranks[target].slots[slot][me.number] = epoch

        def signal(target: int, amount: int) -> None:
            ranks[target].arrived[me.number] += amount

        def put() -> None:
            me.network[:] = filter(None, me.network)
            for target in range(len(ranks)):
                num_pieces = self.NUM_PIECES if target in self.targets else 0
                for piece in range(num_pieces):
                    fly(
                        lambda target=target, piece=piece: write(target, piece),
                        lambda target=target: signal(target, 1),
                    )
                if target != me.number:
                    fly(lambda target=target, rest=UNIT - num_pieces: signal(target, rest))

        def finish() -> None:
            me.num_sent = epoch + 1
            me.arrived[me.number] = (epoch + 1) * UNIT

        me.enqueue("send", put)
        me.enqueue("send", finish, lambda: not self.waits or not any(me.network))


class SimulatedRoute:
    """Copies (epoch, source) to the slots of some peers."""

    def __init__(self, wires: SimulatedWires, targets: Sequence[int]) -> None:
        self.wires, self.targets = wires, targets

    def send(self, bases: Sequence[int], slot: int, epoch: int, begun: object = None) -> None:
        me, cells = self.wires.me, [self.wires.ranks[target].slots[slot] for target in self.targets]
        me.copy("send", *(partial(cell.__setitem__, me.number, epoch) for cell in cells))
        self.wires.tell_arrival(epoch)


class Deadlock(AssertionError):
    """No stream can go on."""


def run_all(ranks: Sequence[Rank], choice: random.Random) -> None:
    """Run until all streams are empty, in random order."""
    while waiting := [queue for rank in ranks for queue in rank.all_queues() if queue]:
        able = [queue for queue in waiting if queue[0].is_ready()]
        if not able:
            raise Deadlock(f"{len(waiting)} streams wait for ever")
        choice.choice(able).popleft().run()


def run_exchanges(
    seed: int, num_ranks: int, num_slots: int, num_epochs: int, broken: str = "", by_puts: bool = False
) -> None:
    """Random exchanges through a ring on all ranks; asserts that nobody reads what was not sent, or written over.

    Args:
        broken: leave something out, to see that it is noticed: "credit", "arrival", "fence" or, of puts, "quiet".
        by_puts: pieces are put with signals that count, and overtake each other.
    """
    choice = random.Random(seed)
    ranks = [Rank(number, num_ranks, num_slots) for number in range(num_ranks)]
    if broken == "fence":
        for rank in ranks:
            rank.write_behind_fence = rank.enqueue  # type: ignore[method-assign]
    kind = SimulatedPutWires if by_puts else SimulatedWires
    wires = [kind(ranks, me) for me in range(num_ranks)]
    for wire in wires:
        if broken == "credit":
            wire.await_credit = lambda credit, epoch: None  # type: ignore[method-assign]
        if broken == "arrival":
            wire.await_arrival = lambda sources, epoch: None  # type: ignore[method-assign]
    exchanges = [SlotExchange(Ring(num_slots), wire) for wire in wires]
    lent: deque[int] = deque()
    num_read = 0

    def read(me: int, epoch: int, sources: Sequence[int]) -> None:
        nonlocal num_read
        num_read += 1
        for source in sources:
            found = ranks[me].slots[epoch % num_slots].get(source)
            assert found == epoch, f"rank {me} reads {found} of rank {source} in epoch {epoch}"

    def drop_what_was_sent(rank: Rank, epoch: int) -> None:
        assert rank.num_sent > epoch, f"rank {rank.number} still reads what epoch {epoch} sends"

    def give_back(epoch: int) -> None:
        for me, exchange in enumerate(exchanges):
            exchange.release(epoch, ranks[me].record("caller"))

    for epoch in range(num_epochs):
        sends = [[d for d in range(num_ranks) if choice.random() < 0.6] for _ in range(num_ranks)]
        is_lent = choice.random() < 0.5
        while lent and lent[0] <= epoch - num_slots:
            give_back(lent.popleft())
        for me, (rank, exchange, wire) in enumerate(zip(ranks, exchanges, wires, strict=True)):
            sources = tuple(source for source in range(num_ranks) if me in sends[source])
            rank.wait("send", rank.record("caller"))
            assert exchange.begin() == epoch
            if isinstance(wire, SimulatedPutWires):
                route: Route = SimulatedPuts(wire, sends[me], waits=broken != "quiet")
            else:
                route = SimulatedRoute(wire, sends[me])
            prepared = Prepared(route, sources)
            exchange.send(prepared, epoch, [])
            exchange.arrive(prepared, epoch)
            rank.enqueue("arrive", lambda rank=rank, epoch=epoch: drop_what_was_sent(rank, epoch))
            if not is_lent:
                rank.enqueue("arrive", lambda me=me, epoch=epoch, sources=sources: read(me, epoch, sources))
            done = rank.record("arrive")
            if is_lent:
                rank.wait("caller", done)
                for _ in range(1 + choice.randrange(2)):  # a kernel that reads for some time
                    rank.enqueue("caller", lambda me=me, epoch=epoch, sources=sources: read(me, epoch, sources))
            else:
                exchange.release(epoch, done)
        if is_lent:
            lent.append(epoch)
            if choice.random() < 0.5:
                give_back(lent.popleft())
    run_all(ranks, choice)
    assert broken or all(rank.finished == num_epochs for rank in ranks)
    assert num_read >= num_epochs * num_ranks
