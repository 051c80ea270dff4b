# SPDX-License-Identifier: Apache-2.0
"""GPUs of a group, emulated in one process: ranks and streams are threads, and all memory is the host's.

All of a context's own Python code runs as it is; only the driver, the kernels and PyTorch's streams are replaced.
"""

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from magi_attention.comm import hierarchical
from magi_attention.comm import streams as core_streams
from magi_attention.comm import work as core_work
from magi_comm_grpcoll import context, kernels, lane, puts, routes, streams, wires
from magi_comm_grpcoll import work as native_work
from tests.comm.emulated_kernels import Driver, Launch
from tests.comm.emulated_streams import (
    GIVE_UP_S,
    Event,
    Stream,
    communication_stream,
    current_stream,
    machine,
    start_machine,
    stream_of_block,
)


class Group:
    """What the ranks share, or some of them."""

    def __init__(self, num_ranks: int, members: Sequence[int] | None = None) -> None:
        self.num_ranks, self.barrier = num_ranks, threading.Barrier(num_ranks)
        self.members = [*range(num_ranks)] if members is None else [*members]
        self._turns = [itertools.count() for _ in range(num_ranks)]
        self._shown: dict[int, list[Any]] = {}

    @property
    def rank(self) -> int:
        """The number of this thread's rank in it."""
        return self.members.index(machine().of_thread.rank)

    def exchange(self, value: Any) -> list[Any]:
        """What all ranks show each other; nothing of it is kept."""
        rank = self.rank
        turn = next(self._turns[rank])
        self._shown.setdefault(turn, [None] * self.num_ranks)[rank] = value  # whichever rank comes first
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
        with machine().without_order():  # PyTorch waits for the GPU before it unmaps any; nothing shall rely on it
            self.local = torch.zeros(num_bytes, dtype=torch.uint8, device="cpu")
        self.parts = group.exchange(self.local)
        self.addresses = np.array([part.data_ptr() for part in self.parts])
        if not is_mapped:
            rank = group.rank
            machine().symmetric.insert(0, (self.addresses.tolist(), num_bytes))
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
    emulated = start_machine()
    for module, name, value in (
        (context, "Handshake", Handshake),
        (context, "MappedAllocator", lambda device, group, handshake: Allocator(group, is_mapped=True)),
        (context, "HeapAllocator", lambda heap, handshake, streams: Allocator(handshake.group, is_mapped=False)),
        (context, "heap_of", lambda *of: None),
        (context.dist, "get_process_group_ranks", lambda group: group.members),
        (context, "agree", lambda handshake, device, needs: ""),
        (context, "group_timeout_s", lambda group, device: GIVE_UP_S),
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
        (hierarchical, "communication_stream", lambda group, device: communication_stream()),
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
    with emulated.placed():
        yield
    emulated.end()


_torch_zeros, _from_numpy, _core_take_all_rows = torch.zeros, torch.from_numpy, context.take_all_rows


def _take_all_rows(*arguments: Any) -> None:
    with stream_of_block(current_stream()):
        _core_take_all_rows(*arguments)


def _zeros(*size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
    if not pin_memory:
        return _torch_zeros(*size, **options)
    if torch.device(options.get("device") or torch.get_default_device()).type != "cpu":
        raise RuntimeError("only memory of the CPU can be pinned")
    with machine().without_order():  # the allocator of pinned memory knows of no stream that uses it
        return _torch_zeros(*size, **options)


def run_ranks(num_ranks: int, run: Callable[[int, Group], Any], timeout_s: float = 60) -> list[Any]:
    """Call ``run(rank, group)`` in a thread for each rank; returns the results, or raises the first error."""
    group, results, errors = Group(num_ranks), [None] * num_ranks, []

    def work(rank: int) -> None:
        machine().of_thread.rank = rank
        try:
            with machine().placed():
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
