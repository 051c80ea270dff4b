# SPDX-License-Identifier: Apache-2.0
"""GPUs of a group, emulated in one process: ranks and streams are threads, and all memory is the host's.

All of a context's own Python code runs as it is; only the driver, the kernels and PyTorch's streams are replaced.
"""

import ctypes
import gc
import itertools
import queue
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from magi_attention.comm import hierarchical
from magi_attention.comm import streams as core_streams
from magi_attention.comm import work as core_work
from magi_comm_grpcoll import context, kernels, lane, puts, routes, streams, wires
from magi_comm_grpcoll import work as native_work
from magi_comm_grpcoll.driver import MEMORY_OPERATION, WAIT_VALUE
from magi_comm_grpcoll.tables import TASK
from tests.comm.emulated_memory import Memory, Placed

_GIVE_UP_S = 20.0


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
        deadline = time.monotonic() + _GIVE_UP_S
        for stream in self.streams:
            stream.thread.join(max(0.0, deadline - time.monotonic()))
        waiting = [stream.name for stream in self.streams if stream.thread.is_alive()]
        self.is_over = True
        for stream in self.streams:
            stream.thread.join()
        self.check()
        assert not waiting, f"streams that never end: {waiting}"


_machine: Machine


def _now(run: Callable[[], None]) -> None:
    run()


class Event:
    """Waits are for what was recorded last before them."""

    def __init__(self) -> None:
        self.done = threading.Event()

    def record(self, stream: "Stream") -> None:
        self.done = threading.Event()
        stream.enqueue(self.done.set)

    def query(self) -> bool:
        return self.done.is_set()

    def synchronize(self) -> None:
        self.done.wait()
        _machine.check()


class Copies(list[tuple[int, int, int]]):
    """Pieces that a stream copies: target, source and bytes."""


class Stream:
    """A thread that carries out what it is given, in order and with random pauses.

    But copies that follow each other arrive in any order, until something else comes: they take different engines.
    """

    def __init__(self, device: object = None, priority: int = 0) -> None:
        self.device, self.device_index, self._machine = torch.device("cpu"), 0, _machine
        _machine.streams.append(self)
        self.cuda_stream = _machine.streams.index(self) + 1
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
                self._carry_out(partial(_copy, *piece), choice)
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
    if not hasattr(_machine.of_thread, "stream"):
        _machine.of_thread.stream = Stream()
    return _machine.of_thread.stream


def _communication_stream() -> Stream:
    if not hasattr(_machine.of_thread, "communication"):
        _machine.of_thread.communication = Stream()
    return _machine.of_thread.communication


@contextmanager
def stream_of_block(stream: Stream) -> Iterator[None]:
    """What PyTorch does in the block happens at once, so all before it must have happened."""
    here = _machine.of_thread
    before = current_stream(), getattr(here, "block", None)
    here.stream = here.block = stream
    try:
        stream.synchronize()
        yield
    finally:
        here.stream, here.block = before


class Driver:
    def copies(self, *arguments: int) -> Callable[[], None]:
        return partial(self.copy, *arguments)

    def memory_operations(self, *arguments: int) -> Callable[[], None]:
        return partial(self.enqueue_memory_operations, *arguments)

    def copy(self, targets: int, sources: int, sizes: int, count: int, stream: int) -> None:
        columns = [
            np.frombuffer(ctypes.string_at(at, 8 * count), np.uint64).tolist() for at in (targets, sources, sizes)
        ]
        _machine.streams[stream - 1].enqueue(Copies(zip(*columns, strict=True)))

    def enqueue_memory_operations(self, operations: int, count: int, stream: int) -> None:
        table = np.frombuffer(ctypes.string_at(operations, MEMORY_OPERATION.itemsize * count), MEMORY_OPERATION)
        columns = table[["operation", "address", "value"]].tolist()
        _machine.streams[stream - 1].enqueue(lambda: [_operate(*each) for each in columns] and None)


def _copy(target: int, source: int, num_bytes: int) -> None:
    _array(target, np.uint8, num_bytes)[:] = _array(source, np.uint8, num_bytes)


def _operate(operation: int, address: int, value: int) -> None:
    if operation == WAIT_VALUE:
        _machine.until(lambda: _array(address, np.int64, 1)[0] >= value)
    else:
        _array(address, np.int64, 1)[0] = value


def _array(address: int, dtype: Any, count: int) -> np.ndarray:
    return _machine.memory.at(address, np.dtype(dtype).itemsize * count).view(dtype)


class Launch:
    """See the wheel's; a kernel is its file and its name."""

    def __init__(
        self, stream: Stream, kernel: tuple[str, str], grid: int, block: object, parameters: list[int], shared: int = 0
    ) -> None:
        self._stream, self.parameters = stream, [*parameters]
        runs = {"push": _push, "add_": _add, "put_": _put, "tell": _tell_all, "see_": _see_arrived}
        self._run = runs[kernel[1][:4]]

    def enqueue(self) -> None:
        now = [*self.parameters]
        self._stream.enqueue(lambda: self._run(*now))


def _push(*arguments: int) -> None:
    sources, (arenas, offset, tasks, num_tasks, controls, num_told, flag, value, _) = arguments[:4], arguments[4:]
    for source, target, size, tensor, peer in _array(tasks, TASK, num_tasks).tolist():
        base = int(_array(arenas, np.int64, peer + 1)[peer])
        _copy(base + offset + target, sources[tensor] + source, size)
    for control in _array(controls, np.int64, num_told).tolist():
        _array(control + flag, np.int64, 1)[0] = value


def _put(
    stage: int,
    slot: int,
    tasks: int,
    num_tasks: int,
    counts: int,
    num_told: int,
    me: int,
    flag: int,
    value: int,
    _: int,
) -> None:
    _there(stage, me, me)  # a network adapter reads symmetric memory alone
    table = _array(tasks, TASK, num_tasks).tolist()
    for source, target, size, _, peer in random.sample(table, num_tasks):
        _copy(_there(slot, me, peer) + target, stage + source, size)
        _array(_there(flag, me, peer), np.int64, 1)[0] += 1
    for peer, count in enumerate(_array(counts, np.int32, num_told).tolist()):
        if peer != me:
            _array(_there(flag, me, peer), np.int64, 1)[0] += puts.UNIT - count
    _array(flag, np.int64, 1)[0] = value


def _tell_all(flag: int, value: int, num_peers: int, me: int) -> None:
    for peer in range(num_peers):
        _array(_there(flag, me, peer), np.int64, 1)[0] = value


def _see_arrived(words: int, num_words: int, value: int) -> None:
    assert all(_array(word, np.int64, 1)[0] >= value for word in _array(words, np.int64, num_words).tolist())


def _there(address: int, me: int, peer: int) -> int:
    """The place on a peer that has an address here, in memory that all have."""
    for addresses, size in _machine.symmetric:
        if 0 <= address - addresses[me] < size:
            return address - addresses[me] + addresses[peer]
    raise AssertionError("it is in no symmetric memory")


def _add(into: int, slots: int, rows: int, offsets: int, places: int, num_rows: int, width: int, average: int) -> None:
    bounds = _array(offsets, np.int32, num_rows + 1)
    for row, (first, last) in zip(_array(rows, np.int32, num_rows), itertools.pairwise(bounds), strict=True):
        target = _array(into + int(row) * width * 4, np.float32, width)
        for place in _array(places, np.int32, int(last))[first:].tolist():
            target += _array(slots + place * width * 4, np.float32, width)
        if average:
            target /= np.float32(1 + last - first)


class Group:
    """What the ranks share, or some of them."""

    def __init__(self, num_ranks: int, members: Sequence[int] | None = None) -> None:
        self.num_ranks, self.barrier = num_ranks, threading.Barrier(num_ranks)
        self.members = [*range(num_ranks)] if members is None else [*members]
        self._turns = [itertools.count() for _ in range(num_ranks)]
        self._shown: defaultdict[int, list[Any]] = defaultdict(lambda: [None] * num_ranks)

    @property
    def rank(self) -> int:
        """The number of this thread's rank in it."""
        return self.members.index(_machine.of_thread.rank)

    def exchange(self, value: Any) -> list[Any]:
        """What all ranks show each other; nothing of it is kept."""
        rank = self.rank
        turn = next(self._turns[rank])
        self._shown[turn][rank] = value
        self.barrier.wait(30)
        answers = [*self._shown[turn]]
        self.barrier.wait(30)
        self._shown.pop(turn, None)
        return answers


class Handshake:
    def __init__(self, group: Group, timeout_s: float) -> None:
        self.group = group

    def exchange(self, message: bytes) -> list[bytes]:
        return self.group.exchange(message)


class SharedMemory:
    def __init__(self, num_bytes: int, group: Group, is_mapped: bool) -> None:
        with _machine.without_order():  # PyTorch waits for the GPU before it unmaps any; nothing shall rely on it
            self.local = torch.zeros(num_bytes, dtype=torch.uint8, device="cpu")
        self.parts = group.exchange(self.local)
        self.addresses = np.array([part.data_ptr() for part in self.parts])
        if not is_mapped:
            rank = group.rank
            _machine.symmetric.insert(0, (self.addresses.tolist(), num_bytes))
            self.addresses[np.arange(group.num_ranks) != rank] = 0  # other hosts
        self.device_addresses = torch.from_numpy(self.addresses)


class Allocator:
    def __init__(self, group: Group, is_mapped: bool) -> None:
        self.group, self.is_mapped = group, is_mapped

    def allocate(self, num_bytes: int) -> SharedMemory:
        return SharedMemory(num_bytes, self.group, self.is_mapped)

    def free_unused(self) -> None:
        pass


@contextmanager
def emulate(monkeypatch: Any) -> Iterator[None]:
    """Replace the GPU in the modules of the wheel; at the end, no stream has anything to do any more."""
    global _machine
    _machine = machine = Machine()
    for module, name, value in (
        (context, "Handshake", Handshake),
        (context, "MappedAllocator", lambda device, group, handshake: Allocator(group, is_mapped=True)),
        (context, "HeapAllocator", lambda heap, handshake, streams: Allocator(handshake.group, is_mapped=False)),
        (context, "heap_of", lambda *of: None),
        (context.dist, "get_process_group_ranks", lambda group: group.members),
        (context, "agree", lambda handshake, device, needs: ""),
        (context, "group_timeout_s", lambda group, device: _GIVE_UP_S),
        (context, "link_everywhere", lambda handshake, device: None),
        (puts, "put_kernel", lambda name, device: ("put", name)),
        (context, "group_rank", lambda group: group.rank),
        (context, "group_size", lambda group: group.num_ranks),
        (wires, "driver", Driver),
        (routes, "driver", Driver),
        (context, "take_all_rows", _take_all_rows),
        *((module, "current_in_block", lambda stream, before: stream_of_block(stream)) for module in (context, lane)),
        (routes, "device_name", lambda device: "emulated"),
        (kernels, "Launch", Launch),
        (kernels, "kernel", lambda fatbin, name, device, shared=0: (fatbin, name)),
        (hierarchical, "communication_stream", lambda group, device: _communication_stream()),
        (streams, "own_streams", lambda device, count: [Stream() for _ in range(count)]),
        (streams, "_idle", {}),
        (streams, "_outliving", {}),
        (core_streams, "_pools", {}),
        (torch.cuda, "Stream", Stream),
        (torch.cuda, "Event", Event),
        (torch.cuda, "stream", stream_of_block),
        (torch.cuda, "current_stream", current_stream),
        *((module, "current_stream", current_stream) for module in (context, native_work, core_work)),
        (torch.cuda, "synchronize", lambda device=None: None),
        (torch.cuda, "is_current_stream_capturing", lambda: False),
        (torch.cuda, "device", lambda device: stream_of_block(current_stream())),
        (torch, "zeros", _zeros),
        (torch, "from_numpy", lambda array: _from_numpy(array).clone()),  # as its upload would be
        (torch.Tensor, "pin_memory", lambda self: self),
    ):
        monkeypatch.setattr(module, name, value)
    with machine.placed():
        yield
    machine.end()


_torch_zeros, _from_numpy, _core_take_all_rows = torch.zeros, torch.from_numpy, context.take_all_rows


def _take_all_rows(*arguments: Any) -> None:
    with stream_of_block(current_stream()):
        _core_take_all_rows(*arguments)


def _zeros(*size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
    if not pin_memory:
        return _torch_zeros(*size, **options)
    if torch.device(options.get("device") or torch.get_default_device()).type != "cpu":
        raise RuntimeError("only memory of the CPU can be pinned")
    with _machine.without_order():  # the allocator of pinned memory knows of no stream that uses it
        return _torch_zeros(*size, **options)


def run_ranks(num_ranks: int, run: Callable[[int, Group], Any], timeout_s: float = 60) -> list[Any]:
    """Call ``run(rank, group)`` in a thread for each rank; returns the results, or raises the first error."""
    group, results, errors = Group(num_ranks), [None] * num_ranks, []

    def work(rank: int) -> None:
        _machine.of_thread.rank = rank
        try:
            with _machine.placed():
                results[rank] = run(rank, group)
        except BaseException as error:
            errors.append(error)
            group.barrier.abort()

    threads = [
        threading.Thread(target=work, args=(rank,), name=f"rank {rank}", daemon=True) for rank in range(num_ranks)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s)
        assert errors or not thread.is_alive(), "a rank hangs"
    if errors:
        raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
    return results
