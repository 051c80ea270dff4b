# SPDX-License-Identifier: Apache-2.0
"""Memory of emulated GPUs, which knows what of it may be used when.

It is the host's, and handed out as PyTorch's allocator hands out that of a GPU: a tensor belongs to the stream that is
current where it is made, and once it is dropped its memory may be used anew by what that stream does next. Here it is
filled with garbage then, and a stream that uses it later, or memory that was never handed out, is a fault. Nothing is
unmapped before the last tensor has gone, so that a fault is an error and no crash.
"""

import mmap
import threading
import weakref
from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

_from_numpy = torch.from_numpy  # which an emulation replaces
_SIZE, _ALIGNMENT, _GARBAGE = 1 << 32, 256, 0xA5


class MemoryFaultError(RuntimeError):
    """An emulated stream used memory that is not there, or not any more."""


class Block:
    """What was handed out at a time.

    Attributes:
        start: first byte.
        stop: behind the last one.
        freed: whether what may overwrite it could be under way.
    """

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop, self.freed = start, stop, False


class Memory:
    """The memory of all GPUs of an emulation. It has no address twice."""

    def __init__(self) -> None:
        pages = mmap.mmap(-1, _SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # which take nothing until used
        self._all = np.frombuffer(pages, np.uint8)
        self._base, self._end, self._lock = self._all.ctypes.data, 0, threading.Lock()
        self._starts, self._blocks = list[int](), list[Block]()

    def take(self, num_bytes: int, later: Callable[[Callable[[], None]], None]) -> Tensor:
        """``[num_bytes]`` uint8, zeros.

        Args:
            num_bytes: at least 1.
            later: called once when the tensor and all its views have gone, with what is to be done as soon as the
                memory may be used anew. It may be called by any thread, in the middle of anything.
        """
        with self._lock:
            first = self._end
            self._end = (first + num_bytes) // _ALIGNMENT * _ALIGNMENT + _ALIGNMENT  # a gap, to find what runs over
            assert self._end <= _SIZE, "the emulation is out of memory"
            block = Block(self._base + first, self._base + first + num_bytes)
            self._starts.append(block.start)
            self._blocks.append(block)
        view = self._all[first : first + num_bytes]
        weakref.finalize(view, later, lambda: self._free(block)).atexit = False
        return _from_numpy(view)  # keeps the view as long as its storage lives

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies here."""
        return 0 <= tensor.untyped_storage().data_ptr() - self._base < _SIZE

    def at(self, address: int, num_bytes: int) -> np.ndarray:
        """``[num_bytes]`` uint8: memory that a stream uses.

        Raises:
            MemoryFaultError: it must not.
        """
        if not num_bytes:
            return self._all[:0]
        number = bisect_right(self._starts, address) - 1
        block = self._blocks[number] if number >= 0 else None
        if block is None or address + num_bytes > block.stop:
            raise MemoryFaultError(f"{num_bytes} bytes at {address:#x} are none that were handed out")
        if block.freed:
            size = block.stop - block.start
            raise MemoryFaultError(
                f"{num_bytes} bytes at {address:#x} are of a tensor of {size} bytes that was dropped"
            )
        first = address - self._base
        return self._all[first : first + num_bytes]

    def _free(self, block: Block) -> None:
        block.freed = True
        self._all[block.start - self._base : block.stop - self._base] = _GARBAGE


class Placed(TorchDispatchMode):
    """Puts all new tensors of the thread that enters it into memory of an emulation.

    Args:
        take: like :meth:`Memory.take`, but for the stream.
        memory: where.
    """

    def __init__(self, memory: Memory, take: Callable[[int], Tensor]) -> None:
        super().__init__()
        self._memory, self._take = memory, take

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = operation(*arguments, **(named or {}))
        given = {_address(x) for x in tree_leaves((arguments, named)) if isinstance(x, Tensor)}
        if operation is torch.ops.aten.lift_fresh.default:  # brings what torch.tensor made
            given = set()
        return tree_map_only(Tensor, lambda x: x if _address(x) in given else self._placed(x), result)

    def _placed(self, tensor: Tensor) -> Tensor:
        num_bytes = tensor.untyped_storage().nbytes()
        if not num_bytes or self._memory.holds(tensor):
            return tensor
        storage = self._take(num_bytes).untyped_storage()
        storage.copy_(tensor.untyped_storage())
        place = tensor.storage_offset(), tensor.shape, tensor.stride()
        return torch.empty(0, dtype=tensor.dtype, device="cpu").set_(storage, *place)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
