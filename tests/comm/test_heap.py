# SPDX-License-Identifier: Apache-2.0
"""NVSHMEM's memory: started for one group, given out, and freed by all ranks together. Its bindings are replaced."""

import gc
import sys
import threading
from contextlib import suppress
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from magi_comm_grpcoll import CapacityError, NotNativeError, heap
from magi_comm_grpcoll.heap import Heap, HeapAllocator, heap_of, reason_against_nvshmem
from magi_comm_grpcoll.puts import link_everywhere

CPU = torch.device("cpu")


class Bindings:
    """Notes what one rank frees; a pair's second rank is out of reach."""

    def __init__(self) -> None:
        self.next, self.freed, self.left = 1 << 20, [], 1 << 30
        self.status = 0

    def init_status(self) -> int:
        return self.status

    def malloc(self, num_bytes: int) -> int:
        if num_bytes > self.left:
            return 0
        self.next += num_bytes
        return self.next - num_bytes

    def free(self, address: int) -> None:
        self.freed.append(address)

    def ptr(self, address: int, pe: int) -> int:
        return 0 if pe else address


class Ranks:
    """Two ranks in two threads that show each other messages."""

    def __init__(self) -> None:
        self.shown, self.barrier, self.settled = [b"", b""], threading.Barrier(2), list[str]()

    def of(self, rank: int) -> SimpleNamespace:
        def exchange(message: bytes) -> list[bytes]:
            self.shown[rank] = message
            self.barrier.wait(10)
            answers = [*self.shown]
            self.barrier.wait(10)
            return answers

        def settle(proposal: str) -> str:
            self.settled.append(proposal)
            return self.settled[0]

        return SimpleNamespace(exchange=exchange, settle=settle)

    def run(self, each) -> list[object]:
        results: list[object] = [None, None]

        def work(rank: int) -> None:
            try:
                results[rank] = each(rank, self.of(rank))
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


@pytest.fixture
def bindings(monkeypatch):
    of_thread = threading.local()

    def of_this_rank() -> Bindings:
        if not hasattr(of_thread, "bindings"):
            of_thread.bindings = Bindings()
        return of_thread.bindings

    monkeypatch.setattr(heap, "_bindings", of_this_rank)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 40, 1 << 40))
    monkeypatch.setattr(torch, "as_tensor", lambda block, device: SimpleNamespace(block=block))
    return of_this_rank


def test_memory_is_freed_once_no_rank_uses_it(bindings):
    def each(rank, handshake):
        memory = Heap([3, 5], CPU)
        allocator = HeapAllocator(memory, handshake)
        first = allocator.allocate(64)
        assert first.addresses.tolist() == [1 << 20, 0]
        kept = first.local if rank == 1 else None
        del first
        gc.collect()
        second = allocator.allocate(64)
        assert bindings().freed == []  # rank 1 still reads it
        del kept
        gc.collect()
        allocator.free_unused()
        assert bindings().freed == [1 << 20]
        del second
        gc.collect()
        allocator.free_unused()
        assert bindings().freed == [1 << 20, (1 << 20) + 64]
        return "done"

    assert Ranks().run(each) == ["done"] * 2


def test_too_little_memory_is_told_on_all_ranks(bindings, monkeypatch):
    def each(rank, handshake):
        bindings().left = 10
        allocator = HeapAllocator(Heap([0, 1], CPU), handshake)
        with suppress(CapacityError):
            allocator.allocate(64)
        bindings().left = 32  # where all had none, all may have less
        assert allocator.allocate(32).addresses.tolist() == [1 << 20, 0]
        allocator.allocate(64)

    for error in Ranks().run(each):
        assert isinstance(error, CapacityError)
        assert str(error) == "rank 0 can't allocate 64 bytes to receive rows in: NVSHMEM has no memory left"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 1 << 40))
    for error in Ranks().run(each):
        assert "NVSHMEM may take 536870912, and 10 are free" in str(error)


def start(rank, handshake, ranks=(0, 1)):
    return heap_of(ranks, rank, CPU, handshake, handshake, crosses=True)


def test_memory_that_only_some_ranks_got_ends_the_heap(bindings):
    def each(rank, handshake):
        bindings().left = 1 << 30 if rank else 10
        allocator, errors = HeapAllocator(Heap([0, 1], CPU), handshake), []
        for num_bytes in (64, 8):
            with pytest.raises(CapacityError) as raised:
                allocator.allocate(num_bytes)
            errors.append(str(raised.value))
        allocator.free_unused()
        assert bindings().freed == []  # which would wait for rank 0
        return errors

    for first, second in Ranks().run(each):
        assert first == "rank 0 can't allocate 64 bytes to receive rows in: NVSHMEM has no memory left"
        assert "start the processes anew" in second


def prepare(pe, device, crosses):
    return (device, crosses), SimpleNamespace(_data=np.frombuffer(b"number %d" % pe, np.uint8).copy())


def test_it_starts_once_for_one_group(bindings, monkeypatch, no_farewell):
    started = []

    def note(gpu, identity, pe, num_pes):
        started.append((identity._data.tobytes(), pe, num_pes, gpu))
        return ""

    of_rank = threading.local()
    monkeypatch.setattr(heap, "_prepare", prepare)
    monkeypatch.setattr(heap, "_start", note)
    monkeypatch.setattr(heap, "_heap", None)

    def each(rank, handshake):
        of_rank.heap = start(rank, handshake)
        return of_rank.heap.ranks

    assert Ranks().run(each) == [(0, 1)] * 2  # both ranks are this process, so that one heap is the last one's
    assert sorted(started) == [(b"number 0", 0, 2, (CPU, True)), (b"number 0", 1, 2, (CPU, True))]
    for error in Ranks().run(lambda rank, handshake: start(rank, handshake, (0, 2))):
        assert isinstance(error, NotNativeError)
        assert str(error) == "on rank 0 NVSHMEM serves ranks [0, 1] already, and a process can start it once"
    assert {type(each) for each in Ranks().run(start)} == {Heap}
    assert [call[0] for call in no_farewell] == [heap._leave] * 2
    assert len(started) == 2


def test_a_rank_on_which_it_does_not_start_is_named_on_all(bindings, monkeypatch):
    monkeypatch.setattr(heap, "_prepare", prepare)
    monkeypatch.setattr(heap, "_start", lambda gpu, identity, pe, num_pes: "no transport" if pe else "")
    monkeypatch.setattr(heap, "_heap", None)
    for error in Ranks().run(start):
        assert isinstance(error, NotNativeError)
        assert str(error) == "on rank 1 NVSHMEM did not start: no transport"
    assert heap._heap is None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 1 << 40))
    for error in Ranks().run(start):
        assert str(error) == "on rank 0 NVSHMEM takes up to 2415919104 bytes to start, and 10 are free"


@pytest.mark.parametrize("broken", [0, 1])
def test_what_fails_on_one_rank_before_the_start_keeps_all_from_it(bindings, monkeypatch, broken):
    def fail_on_one(pe, device, crosses):
        if pe == broken:
            raise OSError("the GPU has failed\nat length")
        return prepare(pe, device, crosses)

    monkeypatch.setattr(heap, "_prepare", fail_on_one)
    monkeypatch.setattr(heap, "_start", lambda *of: pytest.fail("it waits for the other for ever"))
    monkeypatch.setattr(heap, "_heap", None)
    for error in Ranks().run(start):
        assert isinstance(error, NotNativeError)
        assert str(error) == f"on rank {broken} NVSHMEM can't be started: the GPU has failed"


def test_somebody_elses_nvshmem_is_not_joined(bindings, monkeypatch):
    monkeypatch.setattr(heap, "_start", lambda *of: pytest.fail("it has been started"))
    monkeypatch.setattr(heap, "_heap", None)

    def each(rank, handshake):
        bindings().status = 2 * rank
        start(rank, handshake)

    for error in Ranks().run(each):
        assert isinstance(error, NotNativeError)
        assert str(error).startswith("on rank 1 NVSHMEM has been started in the process before")


def test_a_start_that_gives_other_numbers_is_none(monkeypatch):
    package, core, numbers = ModuleType("nvshmem"), ModuleType("nvshmem.core"), [1, 3]
    package.core = core  # type: ignore[attr-defined]
    made: list[bool] = []  # of each identity, whether it is empty
    core.get_unique_id = lambda empty: made.append(empty)  # type: ignore[attr-defined]
    core.init = lambda **of: None  # type: ignore[attr-defined]
    cuda_core = ModuleType("cuda.core")
    cuda_core.Device = lambda index: SimpleNamespace(set_current=lambda: None)  # type: ignore[attr-defined]
    for name, module in (("nvshmem", package), ("nvshmem.core", core), ("cuda.core", cuda_core)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(heap, "_prepare_environment", lambda crosses: None)
    found = SimpleNamespace(my_pe=lambda: numbers[0], n_pes=lambda: numbers[1], init_status=lambda: 3)
    monkeypatch.setattr(heap, "_bindings", lambda: found)
    gpu, identity = heap._prepare(1, CPU, True)
    assert made == [True]
    heap._prepare(0, CPU, True)
    assert made == [True, False]
    assert heap._start(gpu, identity, 0, 2) == "it is number 1 of 3 instead of 0 of 2"
    numbers[:] = 0, 2
    assert heap._start(gpu, identity, 0, 2) == ""
    found.init_status = lambda: 1  # the ranks have met, and that is all
    assert "no transport reaches the other ranks" in heap._start(gpu, identity, 0, 2)
    found.culibrary_init = lambda handle: 7
    with pytest.raises(RuntimeError, match="does not take its device code, status 7"):
        heap.link(SimpleNamespace(handle=1))


def test_memory_that_pytorch_keeps_to_itself_is_tried_once_more(bindings, monkeypatch):
    emptied: list[int] = []

    def left(device: object) -> tuple[int, int]:
        return 1 << 40 if threading.get_ident() in emptied else 0, 1 << 40

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(threading.get_ident()))
    monkeypatch.setattr(torch.cuda, "mem_get_info", left)

    def each(rank, handshake):
        return HeapAllocator(Heap([0, 1], CPU), handshake).allocate(64).addresses.tolist()

    assert Ranks().run(each) == [[1 << 20, 0]] * 2
    assert len(emptied) == 2  # on both ranks, once


@pytest.fixture(autouse=True)
def no_farewell(monkeypatch):
    registered = []
    monkeypatch.setattr(heap.atexit, "register", lambda *call: registered.append(call))
    return registered


class Busy:
    """A stream with this many questions' work before it."""

    def __init__(self, left: int) -> None:
        self.left = left

    def query(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_it_stops_as_all_ranks_exit(monkeypatch):
    stopped = []
    monkeypatch.setattr(heap, "_bindings", lambda: SimpleNamespace(hostlib_finalize=lambda: stopped.append(1)))

    def leave(rank, handshake, left):
        of_rank = Heap([0, 1], CPU)
        HeapAllocator(of_rank, handshake, [Busy(left if rank else 0)])
        heap._leave(of_rank, handshake)

    assert Ranks().run(lambda rank, handshake: leave(rank, handshake, 3)) == [None, None]
    assert len(stopped) == 2
    monkeypatch.setattr(heap, "FAREWELL_S", 0.1)
    assert Ranks().run(lambda rank, handshake: leave(rank, handshake, 1 << 30)) == [None, None]
    assert len(stopped) == 2  # rank 1 was not done


def test_it_stops_on_no_rank_if_one_does_not_come(monkeypatch):
    def exchange(message):
        raise RuntimeError("ranks [1] did not come")

    def settle(proposal):
        assert proposal == "stay"
        raise RuntimeError("the store is gone")

    monkeypatch.setattr(heap, "_bindings", lambda: pytest.fail("nothing can be stopped alone"))
    for answer in (settle, lambda proposal: proposal):
        heap._leave(Heap([0, 1], CPU), SimpleNamespace(exchange=exchange, settle=answer))


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("3.4.5", ""),
        ("3.8.0", ""),
        ("3.3.9", "NVSHMEM 3.3.9 is installed, and 3.4 or later of the same major version is needed"),
        ("4.0.0", "NVSHMEM 4.0.0 is installed, and 3.4 or later"),
        ("3", "NVSHMEM calls its version '3', which is none like 3.0.0"),
        ("3.x", "NVSHMEM calls its version '3.x'"),
        (None, "NVSHMEM can't be loaded: no library"),
    ],
)
def test_what_is_missing_names_the_fix(monkeypatch, version, reason):
    def get_version() -> object:
        if version is None:
            raise OSError("no library\nand so on")
        return SimpleNamespace(libnvshmem_version=version)

    package, core = ModuleType("nvshmem"), ModuleType("nvshmem.core")
    package.core, core.get_version = core, get_version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nvshmem", package)
    monkeypatch.setitem(sys.modules, "nvshmem.core", core)
    monkeypatch.setattr(heap, "find_spec", lambda name: object())
    found = reason_against_nvshmem()
    assert found.startswith(reason)
    assert bool(found) == bool(reason)
    assert not reason or heap.INSTALL in found
    monkeypatch.setattr(heap, "find_spec", lambda name: None)
    assert reason_against_nvshmem() == f"nvshmem4py is not installed: {heap.INSTALL}"


def test_the_users_environment_stands(monkeypatch):
    names = "NVSHMEM_DISABLE_NVLS", "NVSHMEM_IB_ENABLE_IBGDA", "NVSHMEM_REMOTE_TRANSPORT"
    for name in names:
        monkeypatch.delenv(name, raising=False)
    environment = {name: value for name, value in heap.os.environ.items() if name not in names}
    monkeypatch.setattr(heap.os, "environ", environment)
    environment["NVSHMEM_IB_ENABLE_IBGDA"] = "0"
    heap._prepare_environment(crosses=True)
    assert environment["NVSHMEM_DISABLE_NVLS"] == "1"
    assert environment["NVSHMEM_IB_ENABLE_IBGDA"] == "0"
    assert "NVSHMEM_REMOTE_TRANSPORT" not in environment
    heap._prepare_environment(crosses=False)
    assert environment["NVSHMEM_REMOTE_TRANSPORT"] == "none"


def test_a_kernel_that_is_not_loaded_on_one_rank_is_an_error_on_all(monkeypatch):
    of_thread = threading.local()

    def load(name: str, device: int) -> int:
        if of_thread.rank:
            raise RuntimeError("device code of another version\nwith a trace")
        return 1

    def each(rank, handshake):
        of_thread.rank = rank
        link_everywhere(handshake, torch.device("cuda", 0))

    monkeypatch.setattr("magi_comm_grpcoll.puts.put_kernel", load)
    for error in Ranks().run(each):
        assert isinstance(error, NotNativeError)
        assert str(error) == "on rank 1 the kernel that puts can't be loaded: device code of another version"
