# SPDX-License-Identifier: Apache-2.0
"""Events of exchanges, which are recorded anew for later ones: never while somebody may still wait for them."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import ClassVar

import pytest
import torch

from magi_attention.comm import streams as stream_module
from magi_attention.comm import work as module
from magi_attention.comm.streams import EventPool, events_of
from magi_attention.comm.work import StreamWork


class Event:
    """Remembers behind what it is recorded. Whoever uses it has taken it: others may take what the pool has."""

    pool: ClassVar[EventPool]

    def record(self, stream: "Stream") -> None:
        self.check_is_taken()
        self.behind = (stream.name, stream.num_enqueued)

    def check_is_taken(self) -> None:
        assert self not in self.pool._free


class Stream:
    """Notes what it waits for, as it is when it is told to."""

    device_index = 0

    def __init__(self, name: str) -> None:
        self.name, self.num_enqueued, self.waits = name, 0, list[tuple[str, int]]()

    def wait_event(self, event: Event) -> None:
        event.check_is_taken()
        self.waits.append(event.behind)


@pytest.fixture(autouse=True)
def streams(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    caller, side = Stream("caller"), Stream("side")
    monkeypatch.setattr(module, "current_stream", lambda index: caller)
    return caller, side


@pytest.fixture
def events(monkeypatch):
    monkeypatch.setattr(Event, "pool", EventPool(), raising=False)
    return Event.pool


def start(streams, events: EventPool, packed: Event | None = None, owns_packed: bool = True) -> StreamWork[str]:
    caller, side = streams
    side.num_enqueued += 1
    return StreamWork(side, caller, "result", [], packed, events, owns_packed)


def test_works_under_way_have_events_of_their_own(streams, events):
    caller, _ = streams
    first, second = start(streams, events), start(streams, events)
    assert second.wait() == first.wait() == "result"
    assert caller.waits == [("side", 2), ("side", 1)]


def test_an_event_is_recorded_anew_only_when_its_work_has_gone(streams, events):
    first = start(streams, events)
    used = first._recorded
    first.wait()
    assert start(streams, events)._recorded is not used, "who holds the work could still ask for it"
    del first
    assert used in (start(streams, events)._recorded, start(streams, events)._recorded, *events._free)


def test_a_work_that_nobody_waits_for_is_waited_for_before_its_event_is_given_away(streams, events):
    caller, _ = streams
    work = start(streams, events)
    used = work._recorded
    del work
    assert caller.waits == [("side", 1)]
    assert events.take() is used


def test_an_event_of_two_works_is_given_back_once(streams, events):
    packed = Event()
    inner = start(streams, events, packed)
    outer = start(streams, events, packed, owns_packed=False)
    del outer
    assert packed not in events._free
    del inner
    assert events._free.count(packed) == 1
    assert len(events._free) == 3


def test_once_waited_for_a_work_forgets_an_event_that_another_gives_back(streams, events):
    caller, _ = streams
    packed = Event()
    inner = start(streams, events, packed)
    packed.record(streams[1])
    outer = start(streams, events, packed, owns_packed=False)
    outer.wait_packed()
    outer.wait()
    del inner
    outer.wait_packed()
    assert caller.waits == [("side", 1), ("side", 2), ("side", 1)], "of packed, outer and inner"


def test_a_stream_waits_for_what_another_was_given_before(streams, events):
    caller, side = streams
    for number in range(1, 4):
        caller.num_enqueued = number
        events.let_wait(side, caller)
    assert side.waits == [("caller", 1), ("caller", 2), ("caller", 3)]
    assert len(events._free) == 1


def test_each_gpu_has_events_of_its_own():
    assert events_of(0) is events_of(0)
    assert events_of(0) is not events_of(1)


def test_threads_that_come_together_get_one_stream(monkeypatch):
    both_make_one = Barrier(2, timeout=60)

    def make_stream(device: torch.device, priority: int) -> object:
        both_make_one.wait()
        return object()

    monkeypatch.setattr(stream_module, "_streams", {})
    monkeypatch.setattr(torch.cuda, "Stream", make_stream)
    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(stream_module.communication_stream, None, torch.device("cuda", 0)) for _ in range(2)]
    assert found[0].result() is found[1].result()
