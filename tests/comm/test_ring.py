# SPDX-License-Identifier: Apache-2.0
"""The protocol of slots and counters, in random orders of everything that streams leave open."""

import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_comm_grpcoll.errors import SlotLentError
from magi_comm_grpcoll.exchange import SlotExchange
from magi_comm_grpcoll.ring import Ring
from tests.comm.simulation import run_exchanges


@settings(max_examples=300)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 3), st.integers(1, 12), st.booleans())
def test_nobody_reads_too_early_or_what_is_written_over(seed, num_ranks, num_slots, num_epochs, by_puts):
    run_exchanges(seed, num_ranks, num_slots, num_epochs, by_puts=by_puts)


@pytest.mark.parametrize(
    ("broken", "by_puts"),
    [("credit", False), ("arrival", False), ("fence", False), ("credit", True), ("arrival", True), ("quiet", True)],
)
def test_without_a_wait_it_is_noticed(broken, by_puts):
    def run() -> None:
        for seed in range(50):
            run_exchanges(seed, 3, 2, 12, broken, by_puts)

    with pytest.raises(AssertionError, match="reads"):
        run()


def test_a_slot_that_is_still_lent_is_refused():
    ring = Ring(2)
    assert [ring.begin(), ring.begin()] == [0, 1]
    with pytest.raises(SlotLentError, match="hold 2 of 2 slots, and 1 more are needed"):
        ring.begin()
    assert ring.release(1) == 0  # the older one is still lent
    with pytest.raises(SlotLentError):
        ring.begin()
    assert ring.release(0) == 2
    assert ring.begin() == 2
    assert [ring.credit_needed(epoch) for epoch in (0, 1, 2, 5)] == [0, 0, 1, 4]


def test_an_epoch_is_given_back_once():
    ring = Ring(1)
    for epoch in (0, -1):
        with pytest.raises(ValueError, match="not lent"):
            ring.release(epoch)
    ring.release(ring.begin())
    with pytest.raises(ValueError, match="epoch 0 is not lent"):
        ring.release(0)


class NotedWires:
    """Notes what is enqueued on the stream that tells credits: waits for events, which are epochs, and numbers."""

    def __init__(self) -> None:
        self.noted: list[tuple[str, int]] = []

    def await_credit(self, credit: int, epoch: int) -> None:
        pass

    def tell_credit(self, credit: int, after: int) -> None:
        self.noted.append(("wait", after))
        self.noted.append(("tell", credit))

    def check(self, num_epochs: int) -> None:
        awaited, told = set[int](), 0
        for what, number in self.noted:
            if what == "wait":
                awaited.add(number)
            else:
                assert awaited >= {*range(number)}, f"{number} slots are given back behind the readers of {awaited}"
                told = max(told, number)
        assert told == num_epochs


def interrupt(number: int, run: Callable[[], None]) -> Callable[..., Any]:
    """A trace function that runs something before the line of that number, of those of the protocol."""
    lines = iter(range(number + 1))

    def trace(frame: Any, event: str, argument: object) -> Any:
        if not frame.f_code.co_filename.endswith(("exchange.py", "ring.py")):
            return None
        if event == "line" and next(lines, None) == number:
            sys.settrace(None)
            run()
        return trace

    return trace


def test_works_may_go_in_the_middle_of_another_ones_release():
    """As the garbage collector lets them, before any line of what a release does."""
    count, is_interrupted = 0, True
    while is_interrupted:
        wires, is_interrupted = NotedWires(), False
        exchange = SlotExchange(Ring(4), wires)
        for _ in range(4):
            exchange.begin()

        def release_others(exchange: SlotExchange = exchange) -> None:
            nonlocal is_interrupted
            is_interrupted = True
            exchange.release(0, 0)
            exchange.release(2, 2)

        before = sys.gettrace()
        sys.settrace(interrupt(count, release_others))
        try:
            exchange.release(1, 1)
        finally:
            sys.settrace(before)
        if is_interrupted:
            exchange.release(3, 3)
            wires.check(4)
            count += 1
    assert count > 15


def test_works_may_go_on_several_threads_at_once():
    wires = NotedWires()
    exchange = SlotExchange(Ring(400), wires)
    for _ in range(400):
        exchange.begin()

    def release(first: int) -> None:
        for epoch in range(first, 400, 4):
            exchange.release(epoch, epoch)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=release, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    wires.check(400)
