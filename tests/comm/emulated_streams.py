# SPDX-License-Identifier: Apache-2.0
"""Emulated GPUs and their streams: threads that carry out in order what they are given."""

import gc
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from tests.comm.emulated_memory import Memory, Placed

GIVE_UP_S = 20.0


class Ended(BaseException):
    """The emulation has ended, or failed, while a stream waited."""


class Machine:
    """The GPUs of an emulation: their memory, and their streams, which are threads.

    A stream's fault, such as a use of memory that has gone, is kept: every later host synchronization raises it, as
    that of a GPU, and the end of the emulation does.
    """

    def __init__(self) -> None:
        self.memory, self.streams, self.of_thread = Memory(), list[Stream](), threading.local()
        self.symmetric: list[tuple[list[int], int]] = []  # by allocation, its address on each rank, and its size
        self.fault: BaseException | None = None
        self.is_over = False

    def fail(self, error: BaseException) -> None:
        """Keep what a stream did wrong; all streams do nothing but end from now on."""
        self.fault, self.is_over = self.fault or error, True

    def check(self) -> None:
        """Raise what a stream did wrong."""
        if self.fault is not None:
            raise self.fault

    def until(self, holds: Callable[[], bool]) -> None:
        """Wait, in a stream's thread."""
        while not holds():
            if self.is_over:
                raise Ended
            time.sleep(1e-4)

    def placed(self) -> Placed:
        """A block in which this thread's tensors are made in the GPUs' memory."""
        return Placed(self.memory, self._take)

    def _take(self, num_bytes: int) -> torch.Tensor:
        at_once = getattr(self.of_thread, "is_without_order", False)
        return self.memory.take(num_bytes, _now if at_once else current_stream().enqueue)

    @contextmanager
    def without_order(self) -> Iterator[None]:
        """A block whose tensors' memory may be used anew as soon as they are dropped, whatever streams still do."""
        self.of_thread.is_without_order = True
        yield
        self.of_thread.is_without_order = False

    def end(self) -> None:
        """Wait until all streams have done what they were given, and end their threads."""
        gc.collect()  # works and tensors in cycles: what they were to enqueue when they go
        for stream in self.streams:
            stream.finish()
        deadline = time.monotonic() + GIVE_UP_S
        for stream in self.streams:
            stream.thread.join(max(0.0, deadline - time.monotonic()))
        waiting = [stream.name for stream in self.streams if stream.thread.is_alive()]
        self.is_over = True
        for stream in self.streams:
            stream.thread.join()
        self.check()
        assert not waiting, f"streams that never end: {waiting}"


_current: Machine


def start_machine() -> Machine:
    """Start an emulation, whose machine is the one from now on."""
    global _current
    _current = Machine()
    return _current


def machine() -> Machine:
    """The machine of the emulation under way."""
    return _current


def _now(run: Callable[[], None]) -> None:
    run()


class Event:
    """Waits are for what was recorded last before them. There is a handle only then."""

    def __init__(self) -> None:
        self.done, self.cuda_event = threading.Event(), 0

    def record(self, stream: "Stream") -> None:
        self.done, self.cuda_event = threading.Event(), id(self)
        stream.enqueue(self.done.set)

    def query(self) -> bool:
        return self.done.is_set()

    def synchronize(self) -> None:
        self.done.wait()
        machine().check()


class Copies(list[tuple[int, int, int]]):
    """Pieces that a stream copies: target, source and bytes."""


class Stream:
    """A thread that carries out what it is given, in order and with random pauses.

    But copies that follow each other arrive in any order, until something else comes: they take different engines.
    """

    def __init__(self, device: object = None, priority: int = 0) -> None:
        self.device, self.device_index, self._machine = torch.device("cpu"), 0, machine()
        machine().streams.append(self)
        self.cuda_stream = machine().streams.index(self) + 1
        self.name = f"stream {self.cuda_stream} of {threading.current_thread().name}"
        # Unlike other queues, of use in finalizers, which interrupt any thread anywhere.
        self._queue: queue.SimpleQueue[Callable[[], None] | Copies | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        choice, under_way = random.Random(self.cuda_stream), Copies()
        run: Callable[[], None] | Copies | None = Copies()
        while run is not None:
            run = self._next(wait_s=1e-3 if under_way else None)
            if isinstance(run, Copies):
                under_way += run
                continue
            choice.shuffle(under_way)
            for piece in under_way:
                self._carry_out(partial(copy, *piece), choice)
            under_way.clear()
            if run is not None:
                self._carry_out(run, choice)

    def _carry_out(self, run: Callable[[], None], choice: random.Random) -> None:
        if choice.random() < 0.1:
            time.sleep(choice.random() * 2e-3)
        try:
            run()
        except Ended:
            pass
        except BaseException as error:
            self._machine.fail(error)

    def _next(self, wait_s: float | None) -> Callable[[], None] | Copies | None:
        try:
            return self._queue.get(timeout=wait_s)
        except queue.Empty:
            return lambda: None  # nothing follows for so long that all copies arrive

    def enqueue(self, run: Callable[[], None] | Copies) -> None:
        self._queue.put(run)

    def finish(self) -> None:
        self._queue.put(None)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        done = event.done
        self.enqueue(lambda: self._machine.until(done.is_set))
        if getattr(self._machine.of_thread, "block", None) is self:
            self.synchronize()  # what PyTorch does next happens at once

    def synchronize(self) -> None:
        self.record_event().synchronize()

    def query(self) -> bool:
        return self.record_event().done.wait(0.01)


def current_stream(device: object = None) -> Stream:
    if not hasattr(machine().of_thread, "stream"):
        machine().of_thread.stream = Stream()
    return machine().of_thread.stream


def communication_stream() -> Stream:
    if not hasattr(machine().of_thread, "communication"):
        machine().of_thread.communication = Stream()
    return machine().of_thread.communication


@contextmanager
def stream_of_block(stream: Stream) -> Iterator[None]:
    """What PyTorch does in the block happens at once, so all before it must have happened."""
    here = machine().of_thread
    before = current_stream(), getattr(here, "block", None)
    here.stream = here.block = stream
    try:
        stream.synchronize()
        yield
    finally:
        here.stream, here.block = before


def copy(target: int, source: int, num_bytes: int) -> None:
    array(target, np.uint8, num_bytes)[:] = array(source, np.uint8, num_bytes)


def array(address: int, dtype: Any, count: int) -> np.ndarray:
    return machine().memory.at(address, np.dtype(dtype).itemsize * count).view(dtype)
