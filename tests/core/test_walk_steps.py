# SPDX-License-Identifier: Apache-2.0
"""When exchanges are launched, beside kernels and each other."""

from types import SimpleNamespace

import torch

from magi_attention.runtime.launches import LaunchStep
from magi_attention.runtime.streams import Returns, walk_steps


class Notes:
    """Collectives that note what is launched, and when it is waited for."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.are_there: list[object] = []

    def cast(self, tensors, exchange, own_places=None, lend=False):
        self.said.append(f"cast {exchange}")
        return SimpleNamespace(
            wait=lambda: self.said.append(f"arrived {exchange}") or tensors,
            wait_packed=lambda: self.said.append(f"packed {exchange}"),
            release=lambda: None,
        )

    def reduce(self, partials, exchange, into, own_places=None, rows_there=None):
        self.said.append(f"reduce {exchange}")
        self.are_there.append(rows_there)
        return SimpleNamespace(
            wait=lambda: self.said.append(f"home {exchange}"),
            wait_packed=lambda: self.said.append(f"begins {exchange}"),
        )


def step(number: int, *, own: bool = False) -> LaunchStep:
    exchange = None if own else number
    return LaunchStep(SimpleNamespace(number=number, exchange=exchange, queries_travel=False), None, ())


def test_two_exchanges_are_under_way_beside_a_kernel():
    notes, x = Notes(), torch.zeros(1)
    steps = [step(0, own=True), step(1), step(2), step(3)]
    for each in walk_steps(steps, notes, [x], x, x):
        notes.said.append(f"kernel {each.step.step.number}")
    assert notes.said == [
        *("cast 1", "packed 1", "cast 2", "kernel 0", "arrived 1", "kernel 1", "cast 3", "arrived 2", "kernel 2"),
        *("arrived 3", "kernel 3"),
    ]


def test_without_an_own_step_the_exchange_comes_first():
    notes, x = Notes(), torch.zeros(1)
    for each in walk_steps([step(1)], notes, [x], x, x):
        notes.said.append(f"kernel {each.step.step.number}")
    assert notes.said == ["cast 1", "arrived 1", "kernel 1"]


def test_at_most_two_steps_gradients_are_on_their_way_home():
    notes = Notes()
    returns = Returns(notes, torch.float32)
    for number in range(1, 5):
        returns.put(step(number).step, [torch.zeros(1)], [torch.zeros(1)])
        returns.send()
        returns.send()  # nothing waits any more
    returns.finish()
    assert notes.said == [
        *("reduce 1", "reduce 2", "home 1", "reduce 3", "home 2", "reduce 4"),
        *("home 3", "home 4"),
    ]


def test_gradients_begin_to_travel_before_kernels_that_follow():
    notes = Notes()
    returns = Returns(notes, torch.float32)
    for number in (1, 2):  # the second one may wait for the first
        returns.put(step(number).step, [torch.zeros(1)], [torch.zeros(1)])
        returns.send(before_kernels=True)
        returns.send(before_kernels=True)
    assert notes.said == ["reduce 1", "begins 1", "reduce 2"]


def test_gradients_that_are_converted_first_are_there_no_sooner():
    notes, rows_there = Notes(), object()
    returns = Returns(notes, torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        returns.put(step(1).step, [torch.zeros(1, dtype=dtype)], [torch.zeros(1)], rows_there=rows_there)
        returns.send()
    assert notes.are_there == [rows_there, None]
