# SPDX-License-Identifier: Apache-2.0
"""NVSHMEM in this process: started for the ranks of one group, memory that all of them have, and its device code."""

import atexit
import os
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from magi_attention.env.variables import parse_flag
from magi_comm_grpcoll.arena import allocate_everywhere
from magi_comm_grpcoll.errors import CapacityError, first_line
from magi_comm_grpcoll.handshake import Handshake, raise_everywhere

SWITCH_OFF = "MAGI_GRPCOLL_NO_NVSHMEM"
INSTALL = 'pip install "magi-comm-grpcoll[nvshmem]"'
# The device code is linked with this version, and works with later ones of the same major number.
LEAST_VERSION = (3, 4)
# In which NVSHMEM takes memory from the GPU, unless NVSHMEM_CUMEM_GRANULARITY says otherwise. It keeps what is freed.
_STEP_BYTES = 1 << 29
# Of nvshmemx_init_status: ready, and ready with ranks that share a GPU.
_IS_INITIALIZED, _FULL_MPG = 2, 4
# The most that its start was seen to take.
_START_BYTES = 9 << 28
# How long a rank that exits waits for what is under way, and then for the others.
FAREWELL_S = 5.0


def reason_against_nvshmem() -> str:
    """Why this process can't use NVSHMEM, whoever the others are; empty if it can."""
    if parse_flag(os.environ.get(SWITCH_OFF, "").strip()):
        return f"NVSHMEM is switched off by {SWITCH_OFF}"
    if find_spec("nvshmem") is None:
        return f"nvshmem4py is not installed: {INSTALL}"
    try:
        import nvshmem.core

        version = str(nvshmem.core.get_version().libnvshmem_version)
    except Exception as error:  # whatever a library that does not fit the bindings, or can't be loaded, does
        return f"NVSHMEM can't be loaded: {first_line(error)}; {INSTALL}"
    try:
        major, minor = (int(part) for part in version.split(".")[:2])
    except ValueError:
        return f"NVSHMEM calls its version {version!r}, which is none like {LEAST_VERSION[0]}.0.0: {INSTALL}"
    if major != LEAST_VERSION[0] or minor < LEAST_VERSION[1]:
        wanted = ".".join(map(str, LEAST_VERSION))
        return f"NVSHMEM {version} is installed, and {wanted} or later of the same major version is needed: {INSTALL}"
    return ""


class Heap:
    """Symmetric memory of the ranks of a group. A process has one; :func:`heap_of` gives it.

    Everything is a collective of the group. NVSHMEM itself waits for ever, so each of its collectives follows a
    handshake, which has a time limit.

    Args:
        ranks: the group's global ranks; their order gives the numbers of the PEs.
        device: this rank's GPU.

    Attributes:
        streams: on which its memory is used.
    """

    def __init__(self, ranks: Sequence[int], device: torch.device) -> None:
        self.ranks, self.device = tuple(ranks), device
        self.streams: list[torch.cuda.Stream] = []
        # What has been given out, in the same order on all ranks, and whether tensors still live in it.
        self._given: list[tuple[int, weakref.ref[_Block]]] = []
        self._is_uneven = False  # on all ranks alike

    def allocate(self, num_bytes: int, handshake: Handshake) -> "HeapMemory":
        """So many bytes on every rank.

        Raises:
            CapacityError: a rank has not so much memory left; on every rank.
        """
        if self._is_uneven:
            raise CapacityError(
                "NVSHMEM gave memory to some ranks and none to others, so the same address is not the same place on "
                "all of them any more: start the processes anew, with more free memory"
            )
        self.free_unused(handshake)
        # NVSHMEM ends the process where its own allocation fails.
        needed = -(-num_bytes // _STEP_BYTES) * _STEP_BYTES

        def look() -> str:
            left = torch.cuda.mem_get_info(self.device)[0]
            return f"NVSHMEM may take {needed}, and {left} are free" if left < needed else ""

        allocate_everywhere(handshake, look, num_bytes)
        address = _bindings().malloc(num_bytes)
        gave = [bool(answer) for answer in handshake.exchange(b"yes" if address else b"")]
        if not all(gave):
            # What some have can't be freed: all ranks must free together, and those without can't come.
            self._is_uneven = any(gave)
            raise CapacityError(
                f"rank {gave.index(False)} can't allocate {num_bytes} bytes to receive rows in: NVSHMEM has no memory "
                "left"
            )
        block = _Block(address, num_bytes)
        self._given.append((address, weakref.ref(block)))
        return HeapMemory(block, self)

    def free_unused(self, handshake: Handshake) -> None:
        """Free what no tensor of any rank lies in any more."""
        unused = [block() is None for _, block in self._given]
        answers = handshake.exchange(np.array(unused, np.bool_).tobytes())
        everywhere = np.logical_and.reduce([np.frombuffer(answer, np.bool_) for answer in answers])
        kept = []
        for entry, is_unused in zip(self._given, everywhere.tolist(), strict=True):
            if is_unused:
                _bindings().free(entry[0])
            else:
                kept.append(entry)
        self._given = kept


class _Block:
    """Memory of the heap, kept by the tensors in it, as they take it by this protocol."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.address, self.num_bytes = address, num_bytes
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


class HeapAllocator:
    """Memory of a heap for one user of it.

    Args:
        heap: the heap.
        handshake: with its ranks.
        streams: on which the memory is used.
    """

    def __init__(self, heap: Heap, handshake: Handshake, streams: "Sequence[torch.cuda.Stream]" = ()) -> None:
        self.heap, self._handshake = heap, handshake
        heap.streams += streams

    def allocate(self, num_bytes: int) -> "HeapMemory":
        """See :class:`~magi_comm_grpcoll.arena.Allocator`."""
        return self.heap.allocate(num_bytes, self._handshake)

    def free_unused(self) -> None:
        """See :class:`~magi_comm_grpcoll.arena.Allocator`."""
        self.heap.free_unused(self._handshake)


class HeapMemory:
    """See :class:`~magi_comm_grpcoll.arena.SharedMemory`.

    Args:
        block: this rank's part.
        heap: where it is from.

    Attributes:
        addresses: 0 for ranks whose memory this one reaches by puts alone. Those name a place by its address here.
    """

    def __init__(self, block: _Block, heap: Heap) -> None:
        self.local: Tensor = torch.as_tensor(block, device=heap.device)
        reached = (_bindings().ptr(block.address, pe) for pe in range(len(heap.ranks)))
        self.addresses: NDArray[np.int64] = np.fromiter(reached, np.int64)
        self.device_addresses = torch.from_numpy(self.addresses).to(heap.device)


# NVSHMEM starts once in a process.
_heap: Heap | None = None


def heap_of(
    ranks: Sequence[int],
    pe: int,
    device: torch.device,
    handshake: Handshake,
    farewell: Handshake,
    crosses: bool,
) -> Heap:
    """The heap of a group, started by the first call, a collective. See :class:`Heap`.

    Args:
        handshake: with the group's ranks.
        farewell: another one, for when the ranks exit.
        crosses: whether its memory is put to ranks on other hosts.

    Raises:
        NotNativeError: NVSHMEM does not start, or serves another group already; on every rank.
    """
    global _heap
    failure = ""
    if _heap is not None and (_heap.ranks != tuple(ranks) or _heap.device != device):
        failure = f"NVSHMEM serves ranks {[*_heap.ranks]} already, and a process can start it once"
    elif _heap is None and _bindings().init_status() > 0:
        failure = "NVSHMEM has been started in the process before, by something else or in vain"
    elif _heap is None and (left := torch.cuda.mem_get_info(device)[0]) < _START_BYTES:
        failure = f"NVSHMEM takes up to {_START_BYTES} bytes to start, and {left} are free"
    raise_everywhere(handshake, failure)
    if _heap is None:
        # Whoever starts it waits for the others without a time limit, so what may fail on one rank alone comes before.
        try:
            gpu, identity = _prepare(pe, device, crosses)
        except Exception as error:  # whatever PyTorch and the bindings do
            failure = first_line(error) or repr(error)
        raise_everywhere(handshake, failure and f"NVSHMEM can't be started: {failure}")
        first, *_ = handshake.exchange(identity._data.tobytes() if pe == 0 else b"")
        if pe:
            identity._data.view(np.uint8)[:] = np.frombuffer(first, np.uint8)
        failure = _start(gpu, identity, pe, len(ranks))
        raise_everywhere(handshake, failure and f"NVSHMEM did not start: {failure}")
        _heap = Heap(ranks, device)
        if crosses:
            atexit.register(_leave, _heap, farewell)
    return _heap


def _leave(heap: Heap, farewell: Handshake) -> None:
    """Stop NVSHMEM, a collective, as the interpreters of all ranks exit.

    Otherwise its thread crashes the process, which unloads the network adapter's library under it. Where a rank does
    not come, or is not done, nothing is stopped: that would wait for ever. One that comes when the others have gone
    sees all of them, so what counts is what the first one to know has settled.
    """
    settled = ""
    with suppress(RuntimeError):  # the store has gone with its rank, which did not stop
        settled = farewell.settle("stop" if _all_are_done(heap, farewell) else "stay")
    if settled == "stop":
        _bindings().hostlib_finalize()


def _all_are_done(heap: Heap, farewell: Handshake) -> bool:
    deadline = time.monotonic() + FAREWELL_S
    try:
        while (is_busy := not all(stream.query() for stream in heap.streams)) and time.monotonic() < deadline:
            time.sleep(0.01)
        return not any(farewell.exchange(b"busy" if is_busy else b""))
    except RuntimeError:  # of a GPU too
        return False


def link(library: Any) -> None:
    """Tell a loaded :class:`cuda.core.ObjectCode` with NVSHMEM's device code where the heap is."""
    if status := _bindings().culibrary_init(int(library.handle)):
        raise RuntimeError(f"NVSHMEM does not take its device code, status {status}")


def _prepare(pe: int, device: torch.device, crosses: bool) -> tuple[Any, Any]:
    """This rank's GPU, and an identity of the ranks that start together: that of PE 0 counts."""
    import nvshmem.core
    from cuda.core import Device

    _prepare_environment(crosses)
    torch.cuda.synchronize(device)  # makes the device's context, which NVSHMEM expects
    gpu = Device(device.index)
    gpu.set_current()
    return gpu, nvshmem.core.get_unique_id(empty=pe != 0)


def _start(gpu: Any, identity: Any, pe: int, num_pes: int) -> str:
    """Start NVSHMEM; returns what went wrong."""
    import nvshmem.core

    try:
        nvshmem.core.init(device=gpu, uid=identity, rank=pe, nranks=num_pes, initializer_method="uid")
    except Exception as error:
        return first_line(error)
    if not _IS_INITIALIZED <= _bindings().init_status() <= _FULL_MPG:  # seen where no transport reaches the others
        return "it says why above; most often no transport reaches the other ranks"
    found = _bindings().my_pe(), _bindings().n_pes()
    return "" if found == (pe, num_pes) else f"it is number {found[0]} of {found[1]} instead of {pe} of {num_pes}"


def _prepare_environment(crosses: bool) -> None:
    """Set what the user has not: no multicast, which nothing here uses, and puts by the GPU itself between hosts."""
    os.environ.setdefault("NVSHMEM_DISABLE_NVLS", "1")
    if crosses:
        os.environ.setdefault("NVSHMEM_IB_ENABLE_IBGDA", "1")
    else:
        os.environ.setdefault("NVSHMEM_REMOTE_TRANSPORT", "none")


def _bindings() -> Any:
    import nvshmem.bindings

    return nvshmem.bindings
