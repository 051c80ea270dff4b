# SPDX-License-Identifier: Apache-2.0
"""The driver and the kernels of emulated GPUs."""

import ctypes
import itertools
import random
from collections.abc import Callable
from functools import partial

import numpy as np

from magi_comm_grpcoll import puts
from magi_comm_grpcoll.driver import MEMORY_OPERATION, WAIT_VALUE
from magi_comm_grpcoll.tables import TASK
from tests.comm.emulated_streams import Copies, Event, Stream, array, copy, machine


class Driver:
    def copies(self, *arguments: int) -> Callable[[], None]:
        return partial(self.copy, *arguments)

    def memory_operations(self, *arguments: int) -> Callable[[], None]:
        return partial(self.enqueue_memory_operations, *arguments)

    def copy(self, targets: int, sources: int, sizes: int, count: int, stream: int) -> None:
        columns = [
            np.frombuffer(ctypes.string_at(at, 8 * count), np.uint64).tolist() for at in (targets, sources, sizes)
        ]
        machine().streams[stream - 1].enqueue(Copies(zip(*columns, strict=True)))

    def enqueue_memory_operations(self, operations: int, count: int, stream: int) -> None:
        table = np.frombuffer(ctypes.string_at(operations, MEMORY_OPERATION.itemsize * count), MEMORY_OPERATION)
        columns = table[["operation", "address", "value"]].tolist()
        machine().streams[stream - 1].enqueue(lambda: [_operate(*each) for each in columns] and None)


def _operate(operation: int, address: int, value: int) -> None:
    if operation == WAIT_VALUE:
        machine().until(lambda: array(address, np.int64, 1)[0] >= value)
    else:
        array(address, np.int64, 1)[0] = value


class Launch:
    """See the wheel's; a kernel is its file and its name."""

    def __init__(
        self, stream: Stream, kernel: tuple[str, str], grid: int, block: object, parameters: list[int], shared: int = 0
    ) -> None:
        self._stream, self.parameters = stream, [*parameters]
        self._begun: Event | None = None
        runs = {"push": _push, "add_": _add, "put_": _put, "tell": _tell_all, "see_": _see_arrived}
        self._run = runs[kernel[1][:4]]

    def tell_begun(self, event: Event | None) -> None:
        assert event is None or event.cuda_event, "the driver refuses an event without a handle"
        self._begun = event

    def enqueue(self) -> None:
        now = [*self.parameters]
        if self._begun is not None:
            self._begun.record(self._stream)
        self._stream.enqueue(lambda: self._run(*now))


def _push(*arguments: int) -> None:
    sources, (arenas, offset, tasks, num_tasks, controls, num_told, flag, value, _) = arguments[:4], arguments[4:]
    for source, target, size, tensor, peer in array(tasks, TASK, num_tasks).tolist():
        base = int(array(arenas, np.int64, peer + 1)[peer])
        copy(base + offset + target, sources[tensor] + source, size)
    for control in array(controls, np.int64, num_told).tolist():
        array(control + flag, np.int64, 1)[0] = value


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
    table = array(tasks, TASK, num_tasks).tolist()
    for source, target, size, _, peer in random.sample(table, num_tasks):
        copy(_there(slot, me, peer) + target, stage + source, size)
        array(_there(flag, me, peer), np.int64, 1)[0] += 1
    for peer, count in enumerate(array(counts, np.int32, num_told).tolist()):
        if peer != me:
            array(_there(flag, me, peer), np.int64, 1)[0] += puts.UNIT - count
    array(flag, np.int64, 1)[0] = value


def _tell_all(flag: int, value: int, num_peers: int, me: int) -> None:
    for peer in range(num_peers):
        array(_there(flag, me, peer), np.int64, 1)[0] = value


def _see_arrived(words: int, num_words: int, value: int) -> None:
    assert all(array(word, np.int64, 1)[0] >= value for word in array(words, np.int64, num_words).tolist())


def _there(address: int, me: int, peer: int) -> int:
    """The place on a peer that has an address here, in memory that all have."""
    for addresses, size in machine().symmetric:
        if 0 <= address - addresses[me] < size:
            return address - addresses[me] + addresses[peer]
    raise AssertionError("it is in no symmetric memory")


def _add(into: int, slots: int, rows: int, offsets: int, places: int, num_rows: int, width: int, average: int) -> None:
    bounds = array(offsets, np.int32, num_rows + 1)
    for row, (first, last) in zip(array(rows, np.int32, num_rows), itertools.pairwise(bounds), strict=True):
        target = array(into + int(row) * width * 4, np.float32, width)
        for place in array(places, np.int32, int(last))[first:].tolist():
            target += array(slots + place * width * 4, np.float32, width)
        if average:
            target /= np.float32(1 + last - first)
