# SPDX-License-Identifier: Apache-2.0
"""The calls of the CUDA driver that an exchange makes, without an object per argument or entry.

Their tables are made once and passed by address: a Python object for each of 500 copies would cost ten times what the
driver needs for all of them, and a launch through NVIDIA's Python objects as much as the rest of a cast.
"""

import ctypes
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

# The structs CUmemcpyAttributes, CUstreamBatchMemOpParams and CUlaunchConfig of cuda.h.
VALUE_OFFSET = 16
_COPY_ATTRIBUTES = np.dtype([("order", "i4"), ("hints", "i4", 4), ("flags", "u4")])
MEMORY_OPERATION = np.dtype(
    {
        "names": ["operation", "address", "value", "flags"],
        "formats": ["u4", "u8", "u8", "u4"],
        "offsets": [0, 8, VALUE_OFFSET, 24],
        "itemsize": 48,
    }
)
LAUNCH = np.dtype(
    {
        "names": ["grid", "block", "shared_bytes", "stream", "attributes", "num_attributes"],
        "formats": ["3u4", "3u4", "u4", "u8", "u8", "u4"],
        "offsets": [0, 12, 24, 32, 40, 48],
        "itemsize": 56,
    }
)
# CUlaunchAttribute, of which this one records an event once every block has begun.
LAUNCH_ATTRIBUTE = np.dtype({"names": ["name", "event"], "formats": ["u4", "u8"], "offsets": [0, 8], "itemsize": 72})
ALL_BLOCKS_BEGUN = 12  # CU_LAUNCH_ATTRIBUTE_LAUNCH_COMPLETION_EVENT
WAIT_VALUE, WRITE_VALUE = 4, 5  # CU_STREAM_MEM_OP_{WAIT,WRITE}_VALUE_64
# More would be refused.
MOST_MEMORY_OPERATIONS = 256

_SOURCE_IN_STREAM_ORDER, _BESIDE_KERNELS = 1, 1
_BESIDE_DEFAULT_STREAM = 1  # CU_STREAM_NON_BLOCKING
_ATTRIBUTES = np.array([(_SOURCE_IN_STREAM_ORDER, [0] * 4, _BESIDE_KERNELS)], _COPY_ATTRIBUTES)
_FIRST_OF_ATTRIBUTE = np.zeros(1, np.uint64)
_CUDA_13 = 13000

_Pointer = ctypes.c_void_p
Call = Callable[[], object]


class Driver:
    """The functions, bound once; :func:`driver` gives the only one.

    What an exchange calls is prepared with its arguments as C has them, so that a call need not convert them. It reads
    what they point to, and raises ``RuntimeError`` for what the driver refuses.
    """

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self._memory_operations = self._checked(self._library.cuStreamBatchMemOp_v2)
        self._launch = self._checked(self._library.cuLaunchKernelEx)
        copy_batch = ctypes.CFUNCTYPE(ctypes.c_int)(self._find("cuMemcpyBatchAsync", _CUDA_13))
        self._copy_batch = self._checked(copy_batch)
        self._make_stream = self._library.cuStreamCreateWithPriority
        self._make_stream.argtypes = [_Pointer, ctypes.c_uint, ctypes.c_int]

    def copies(self, targets: int, sources: int, sizes: int, count: int, stream: int) -> Call:
        """Copies of ``count`` pieces; the arguments are the addresses of uint64 arrays on the host."""
        if not count:  # the driver would refuse it
            return lambda: None
        arrays = _Pointer(targets), _Pointer(sources), _Pointer(sizes), ctypes.c_size_t(count)
        attributes = _Pointer(_ATTRIBUTES.ctypes.data), _Pointer(_FIRST_OF_ATTRIBUTE.ctypes.data), ctypes.c_size_t(1)
        return partial(self._copy_batch, *arrays, *attributes, _Pointer(stream))

    def memory_operations(self, operations: int, count: int, stream: int) -> Call:
        """Waits for and writes of words, given the address of ``count`` :data:`MEMORY_OPERATION`, at least one."""
        table = ctypes.c_uint(count), _Pointer(operations)
        return partial(self._memory_operations, _Pointer(stream), *table, ctypes.c_uint(0))

    def launch(self, launch: int, kernel: int, parameters: int) -> Call:
        """A launch of a kernel, given the addresses of a :data:`LAUNCH` and of the addresses of its parameters."""
        return partial(self._launch, _Pointer(launch), _Pointer(kernel), _Pointer(parameters), _Pointer())

    def make_stream(self, priority: int) -> int:
        """The handle of a new stream of the thread's current context; lower numbers go first."""
        handle = ctypes.c_void_p()
        self._check(self._make_stream(ctypes.byref(handle), _BESIDE_DEFAULT_STREAM, priority))
        assert handle.value is not None
        return handle.value

    def _find(self, name: str, version: int) -> int:
        address, found = ctypes.c_void_p(), ctypes.c_int()
        find = self._library.cuGetProcAddress_v2
        find.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64, ctypes.c_void_p]
        self._check(find(name.encode(), ctypes.byref(address), version, 0, ctypes.byref(found)))
        if not address.value:
            raise RuntimeError(f"the driver has no {name} of CUDA {version // 1000}: it needs release 580 or newer")
        return address.value

    def _checked(self, function: Any) -> Any:
        function.errcheck = self._check
        return function

    def _check(self, status: int, *call: object) -> None:
        if status:
            name = ctypes.c_char_p()
            self._library.cuGetErrorName(status, ctypes.byref(name))
            raise RuntimeError(f"the CUDA driver answered {(name.value or b'an unknown error').decode()} ({status})")


@cache
def driver() -> Driver:
    """The driver.

    Raises:
        OSError: there is none.
        RuntimeError: it is too old.
    """
    return Driver()


def memory_operations(*parts: tuple[int, NDArray[np.int64]]) -> NDArray[np.void]:
    """Operations on words, in this order; their values are to be set.

    Args:
        parts: what to do, :data:`WAIT_VALUE` (until a word has reached the value) or :data:`WRITE_VALUE`, and the
            addresses of the words to do it to.
    """
    operations = np.zeros(sum(len(words) for _, words in parts), MEMORY_OPERATION)
    operations["operation"] = np.repeat([what for what, _ in parts], [len(words) for _, words in parts])
    operations["address"] = np.concatenate([words for _, words in parts])
    return operations
