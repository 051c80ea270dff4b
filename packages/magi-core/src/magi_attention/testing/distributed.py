# SPDX-License-Identifier: Apache-2.0
"""Run functions on several ranks, each a spawned process with the default process group initialized."""

import contextlib
import faulthandler
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection, get_context
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from magi_attention.utils.children import end_with_parent

# After the first failure the others get this long to report theirs, so that the cause is told from its consequences.
_GRACE_S = 0.3
_STARTUP_S = 120.0


class RankError(RuntimeError):
    """A rank raised or died; the message holds its traceback.

    Attributes:
        rank: the rank that failed first.
    """

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(message)
        self.rank = rank


def run_ranks(
    world_size: int, fn: Callable[..., Any], *args: Any, backend: str = "gloo", timeout_s: float = 120.0
) -> list[Any]:
    """Call ``fn(rank, world_size, *args)`` on freshly spawned ranks. See :class:`RankPool`, which this wraps."""
    with RankPool(world_size, backend) as pool:
        return pool.run(fn, *args, timeout_s=timeout_s)


class RankPool:
    """Keeps ranks alive over several calls, since spawning them takes seconds.

    With ``backend`` ``"nccl"`` rank r's current device is ``cuda:r``. The ranks compute with one thread each. After a
    failed or timed-out call all ranks are killed, and the next call spawns new ones.

    >>> with RankPool(2) as pool:  # doctest: +SKIP
    ...     pool.run(pow)  # rank ** world_size
    [0, 1]
    """

    def __init__(self, world_size: int, backend: str = "gloo") -> None:
        self.world_size = world_size
        self.backend = backend
        self._store: dist.TCPStore | None = None
        self._processes: list[SpawnProcess] = []
        self._pipes: list[connection.Connection] = []

    def run(self, fn: Callable[..., Any], *args: Any, timeout_s: float = 120.0) -> list[Any]:
        """Call ``fn(rank, world_size, *args)`` on every rank and return the results in the order of the ranks.

        ``fn`` must be importable by name and, like ``args`` and the results, picklable.

        Raises:
            RankError: a rank raised or died. Nobody waits for the ranks that did not.
            TimeoutError: some ranks were not done within ``timeout_s`` (which does not count the start of new ranks).
        """
        task = pickle.dumps((fn, args))
        if not self._processes:
            self._start()
        try:
            for pipe in self._pipes:
                pipe.send_bytes(pickle.dumps((sys.path, timeout_s, task)))
            return self._collect(timeout_s)
        except BaseException:
            self._kill()
            raise

    def close(self) -> None:
        """End the ranks."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send_bytes(pickle.dumps(None))
        deadline = time.monotonic() + 5.0
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        self._kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> None:
        # The store's server lives here and picks a free port itself: no race for one, and a dead rank can't end it.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = get_context("spawn")
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(rank, self.world_size, self.backend, self._store.port, theirs),
                daemon=True,
                name=f"rank{rank}",
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        try:
            self._collect(_STARTUP_S)
        except BaseException:
            self._kill()
            raise

    def _collect(self, timeout_s: float) -> list[Any]:
        """Receive one answer of every rank."""
        answers: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deaths: dict[int, str] = {}
        deadline = time.monotonic() + timeout_s
        while waiting := [r for r in range(self.world_size) if r not in answers.keys() | failures.keys()]:
            ready = connection.wait([self._pipes[r] for r in waiting], max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for rank in (r for r in waiting if self._pipes[r] in ready):
                try:
                    ok, answer = pickle.loads(self._pipes[rank].recv_bytes())
                except (EOFError, ConnectionResetError):
                    self._processes[rank].join(1.0)
                    ok, answer = False, f"the process died with exit code {self._processes[rank].exitcode}"
                    deaths[rank] = answer
                (answers if ok else failures)[rank] = answer
                if not ok:
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
        if failures:
            rank = next(iter(deaths or failures))
            others = sorted(failures.keys() - {rank})
            also = f"\n(ranks {others} failed too)" if others else ""
            raise RankError(rank, f"rank {rank} of {self.world_size} failed:\n{failures[rank]}{also}")
        if waiting:
            raise TimeoutError(f"ranks {waiting} of {self.world_size} were not done after {timeout_s:g} s")
        return [answers[rank] for rank in range(self.world_size)]

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes, self._store = [], [], None


def _serve(rank: int, world_size: int, backend: str, port: int, pipe: connection.Connection) -> None:
    """A rank's process: join the group, then answer calls until the pool ends or goes away."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller hears of an interrupt too, and ends its ranks
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    with _Answer(pipe) as answer:
        store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        if "nccl" in backend:
            torch.cuda.set_device(rank)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
        answer.value = None
    with contextlib.suppress(EOFError):
        while (call := pickle.loads(pipe.recv_bytes())) is not None:
            with _Answer(pipe) as answer:
                sys.path[:], timeout_s, task = call
                faulthandler.dump_traceback_later(0.9 * timeout_s)  # says where a rank hangs
                fn, args = pickle.loads(task)
                answer.value = fn(rank, world_size, *args)
            faulthandler.cancel_dump_traceback_later()


class _Answer:
    """Sends the value, or the traceback of what its block raised, through the pipe."""

    value: Any

    def __init__(self, pipe: connection.Connection) -> None:
        self._pipe = pipe

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None:
            try:
                message = pickle.dumps((True, self.value))
            except Exception:
                message = pickle.dumps((False, f"the result can't be pickled:\n{traceback.format_exc()}"))
        else:
            message = pickle.dumps((False, "".join(traceback.format_exception(error))))
        self._pipe.send_bytes(message)
        return isinstance(error, Exception)
