# SPDX-License-Identifier: Apache-2.0
"""GPUs of a group, emulated in one process: ranks and streams are threads, and all memory is the host's.

All of a context's own Python code runs as it is; only the driver, the kernels and PyTorch's streams are replaced.
"""

import ctypes
import queue
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from magi_comm_grpcoll import context, kernels, routes, wires
from magi_comm_grpcoll.driver import MEMORY_OPERATION, WAIT_VALUE
from magi_comm_grpcoll.tables import TASK

_local = threading.local()
_streams: dict[int, "Stream"] = {}


class Event:
    """Waits are for what was recorded last before them."""

    def __init__(self) -> None:
        self.done = threading.Event()

    def record(self, stream: "Stream") -> None:
        self.done = threading.Event()
        stream.enqueue(self.done.set)

    def synchronize(self) -> None:
        self.done.wait()


class Stream:
    """A thread that carries out what it is given, in order and with random pauses."""

    def __init__(self, device: object = None, priority: int = 0) -> None:
        self.device, self.device_index, self.cuda_stream = torch.device("cpu"), 0, len(_streams) + 1
        _streams[self.cuda_stream] = self
        self._queue: queue.Queue[Callable[[], None]] = queue.Queue()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        pause = random.Random(self.cuda_stream)
        while True:
            run = self._queue.get()
            if pause.random() < 0.1:
                time.sleep(pause.random() * 2e-3)
            run()
            self._queue.task_done()

    def enqueue(self, run: Callable[[], None]) -> None:
        self._queue.put(run)

    def record_event(self) -> Event:
        event = Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        self.enqueue(event.done.wait)

    def synchronize(self) -> None:
        self._queue.join()

    def query(self) -> bool:
        return not self._queue.unfinished_tasks


def current_stream(device: object = None) -> Stream:
    if not hasattr(_local, "stream"):
        _local.stream = Stream()
    return _local.stream


@contextmanager
def stream_of_block(stream: Stream):
    """What PyTorch does in the block happens at once, so all before it must have happened."""
    before, _local.stream = current_stream(), stream
    stream.synchronize()
    yield
    _local.stream = before


class Driver:
    def copy(self, targets: int, sources: int, sizes: int, count: int, stream: int) -> None:
        columns = [
            np.frombuffer(ctypes.string_at(at, 8 * count), np.uint64).tolist() for at in (targets, sources, sizes)
        ]
        pieces = random.sample(list(zip(*columns, strict=True)), count)  # a batch has no order
        _streams[stream].enqueue(lambda: [ctypes.memmove(*piece) for piece in pieces])

    def enqueue_memory_operations(self, operations: int, count: int, stream: int) -> None:
        table = np.frombuffer(ctypes.string_at(operations, MEMORY_OPERATION.itemsize * count), MEMORY_OPERATION)
        _streams[stream].enqueue(
            lambda: [_operate(*each) for each in table[["operation", "address", "value"]].tolist()]
        )


def _operate(operation: int, address: int, value: int) -> None:
    word = ctypes.c_int64.from_address(address)
    while operation == WAIT_VALUE and word.value < value:
        time.sleep(1e-4)
    if operation != WAIT_VALUE:
        word.value = value


def _array(address: int, dtype: Any, count: int) -> np.ndarray:
    size = np.dtype(dtype).itemsize * count
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype)


def launch(stream: Stream, config: object, kernel: tuple[str, str], *arguments: Any) -> None:
    run = {"push": _push, "add_": _add}[kernel[1][:4]]
    stream.enqueue(lambda: run(*arguments))


def _push(*arguments: Any) -> None:
    sources, (arenas, offset, tasks, num_tasks, controls, num_told, flag, value, _) = arguments[:4], arguments[4:]
    for source, target, size, tensor, peer in _array(tasks, TASK, int(num_tasks)).tolist():
        base = int(_array(arenas, np.int64, peer + 1)[peer])
        ctypes.memmove(base + int(offset) + target, sources[tensor] + source, size)
    for control in _array(controls, np.int64, int(num_told)).tolist():
        ctypes.c_int64.from_address(control + int(flag)).value = int(value)


def _add(
    into: int, slots: int, rows: int, offsets: int, places: int, num_rows: Any, columns: Any, average: Any
) -> None:
    width = int(columns)
    bounds = _array(offsets, np.int32, int(num_rows) + 1)
    for row, (first, last) in zip(_array(rows, np.int32, int(num_rows)), pairwise(bounds), strict=True):
        target = _array(into + int(row) * width * 4, np.float32, width)
        for place in _array(places, np.int32, int(last))[first:].tolist():
            target += _array(slots + place * width * 4, np.float32, width)
        if average:
            target /= np.float32(1 + last - first)


class Group:
    """What the ranks share."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks, self.barrier = num_ranks, threading.Barrier(num_ranks)
        self.shown: dict[object, list[Any]] = defaultdict(lambda: [None] * num_ranks)

    def exchange(self, name: object, value: Any) -> list[Any]:
        self.shown[name][_local.rank] = value
        self.barrier.wait(30)
        answers = [*self.shown[name]]
        self.barrier.wait(30)
        return answers


class Handshake:
    def __init__(self, group: Group, timeout_s: float) -> None:
        self.group = group

    def exchange(self, message: bytes) -> list[bytes]:
        return self.group.exchange("message", message)


class SharedMemory:
    def __init__(self, num_bytes: int, device: object, group: Group, handshake: Handshake) -> None:
        self.local = torch.zeros(num_bytes + 256, dtype=torch.uint8)
        self.local = self.local[-self.local.data_ptr() % 256 :][:num_bytes]
        self.parts = group.exchange("memory", self.local)
        self.addresses = np.array([part.data_ptr() for part in self.parts])
        self.device_addresses = torch.from_numpy(self.addresses)


def emulate(monkeypatch: Any) -> None:
    """Replace the GPU in the modules of the wheel."""
    zeros = torch.zeros
    for module, name, value in (
        (context, "Handshake", Handshake),
        (context, "SharedMemory", SharedMemory),
        (context, "agree", lambda handshake, device: ""),
        (context, "group_rank", lambda group: _local.rank),
        (context, "group_size", lambda group: group.num_ranks),
        (wires, "driver", Driver),
        (routes, "driver", Driver),
        (routes, "device_name", lambda device: "emulated"),
        (kernels, "launch", launch),
        (kernels, "kernel", lambda fatbin, name, device, shared=0: (fatbin, name)),
        (kernels, "launch_config", lambda *arguments: arguments),
        (torch.cuda, "Stream", Stream),
        (torch.cuda, "Event", Event),
        (torch.cuda, "stream", stream_of_block),
        (torch.cuda, "current_stream", current_stream),
        (torch.cuda, "synchronize", lambda device=None: None),
        (torch.cuda, "device", lambda device: stream_of_block(current_stream())),
        (torch, "zeros", lambda *size, pin_memory=False, **options: zeros(*size, **options)),
        (torch.Tensor, "pin_memory", lambda self: self),
    ):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr("magi_comm_grpcoll.arena.SharedMemory", SharedMemory)


def run_ranks(num_ranks: int, run: Callable[[int, Group], Any], timeout_s: float = 60) -> list[Any]:
    """Call ``run(rank, group)`` in a thread for each rank; returns the results, or raises the first error."""
    group, results, errors = Group(num_ranks), [None] * num_ranks, []

    def work(rank: int) -> None:
        _local.rank = rank
        try:
            results[rank] = run(rank, group)
        except BaseException as error:
            errors.append(error)
            group.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s)
        assert errors or not thread.is_alive(), "a rank hangs"
    if errors:
        raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
    return results
