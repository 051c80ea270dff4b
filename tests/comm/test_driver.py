# SPDX-License-Identifier: Apache-2.0
"""Prepared calls of the driver, with a function of Python's in place of its own."""

import ctypes
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

from magi_comm_grpcoll import kernels
from magi_comm_grpcoll.driver import LAUNCH, Driver

_WORD = ctypes.c_uint64


class Fake(Driver):
    """Notes the pieces of each batch of copies, and answers ``status``."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[int, int, int]]] = []
        self.status = 0
        self._library = SimpleNamespace(cuGetErrorName=lambda status, name: setattr(name._obj, "value", b"CUDA_ERROR"))
        self._callback = ctypes.CFUNCTYPE(ctypes.c_int, *[_WORD] * 8)(self._copy)
        address = ctypes.cast(self._callback, ctypes.c_void_p).value
        self._copy_batch = self._checked(ctypes.CFUNCTYPE(ctypes.c_int)(address))

    def _copy(self, targets: int, sources: int, sizes: int, count: int, *others: int) -> int:
        columns = [(_WORD * count).from_address(column) for column in (targets, sources, sizes)]
        self.batches.append([*zip(*columns, strict=True)])
        return self.status


@pytest.mark.parametrize("count", [1, 100])
def test_a_prepared_call_reads_its_arrays_anew(count):
    driver = Fake()
    columns = [np.arange(count, dtype=np.uint64) + (1 << 40) * number for number in range(1, 4)]
    copy = driver.copies(*(column.ctypes.data for column in columns), count, 5)
    for _ in range(2):
        copy()
        assert driver.batches.pop() == [*zip(*(column.tolist() for column in columns), strict=True)]
        columns[1] += np.uint64(64)


def test_no_copies_are_no_call():
    driver = Fake()
    driver.copies(0, 0, 0, 0, 5)()
    assert not driver.batches


def test_what_the_driver_refuses_is_an_error():
    driver, column = Fake(), np.zeros(1, np.uint64)
    copy = driver.copies(*[column.ctypes.data] * 3, 1, 5)
    driver.status = 700
    with pytest.raises(RuntimeError, match=r"CUDA_ERROR \(700\)"):
        copy()


def test_a_launch_tells_that_it_has_begun_if_it_is_asked_to(monkeypatch):
    launched = []

    def launch(launch_: int, kernel: int, parameters: int) -> Callable[[], None]:
        return lambda: launched.append(np.frombuffer(ctypes.string_at(launch_, LAUNCH.itemsize), LAUNCH)[0])

    monkeypatch.setattr(kernels, "driver", lambda: SimpleNamespace(launch=launch))
    made = kernels.Launch(SimpleNamespace(cuda_stream=7), 5, 16, (64, 1), [1, 2], 1000)
    for event in (None, 1 << 40, 3, None):
        made.tell_begun(None if event is None else SimpleNamespace(cuda_event=event))
        made.enqueue()
        told = launched.pop()
        assert told["num_attributes"] == (event is not None)
        if event is not None:  # an id and 64 bytes of which an event and its flags are the first
            attribute = np.frombuffer(ctypes.string_at(int(told["attributes"]), 72), np.uint64)
            assert attribute.tolist() == [12, event, *[0] * 7]
        assert told["grid"].tolist() == [16, 1, 1]
        assert told["block"].tolist() == [64, 1, 1]
        assert (told["shared_bytes"], told["stream"]) == (1000, 7)
