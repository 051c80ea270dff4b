# SPDX-License-Identifier: Apache-2.0
"""Compiling cases in processes of their own."""

import io
import os
import signal
import time
import warnings
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, redirect_stdout
from dataclasses import dataclass
from itertools import groupby
from multiprocessing import active_children, get_context
from typing import Literal
from unittest import mock

import torch

from magi_attention.cli.logs import log_to_stderr
from magi_attention.cli.precompile.options import DTYPES
from magi_attention.kernels.protocol import KernelSelection, PrecompileCase, Precompiles
from magi_attention.kernels.registry import UnloadableBackend, installed_backends
from magi_attention.kernels.speeds import ALIASES
from magi_attention.utils.children import end_with_parent

DIED = "a compiling process died, maybe for lack of memory: try again with fewer --jobs, with 1 to see which case it is"


@dataclass(frozen=True)
class Task:
    """A case of a backend, named so that another process finds it."""

    backend: str
    case: PrecompileCase


@dataclass(frozen=True)
class Outcome:
    """What became of a task.

    Attributes:
        task: the task.
        status: ``"cached"`` if there was nothing to compile.
        seconds: how long it took.
        reason: why it failed.
    """

    task: Task
    status: Literal["compiled", "cached", "failed"]
    seconds: float = 0.0
    reason: str = ""


def find_tasks(selections: Sequence[KernelSelection], names: Sequence[str]) -> list[Task]:
    """Ask the backends for their cases, by architecture.

    Args:
        selections: what to compile.
        names: the backends to ask, their aliases will do; empty for all that can compile ahead of time.

    Raises:
        ValueError: if a backend is not installed or compiles nothing ahead of time.
    """
    installed = installed_backends()
    able = {name: each for name, each in installed.items() if isinstance(each, Precompiles)}
    broken = _unloadable(installed.values())
    wanted = [name if name in installed else ALIASES.get(name, name) for name in names]
    for name in wanted:
        if name in broken:
            raise ValueError(f"backend {name!r}: {broken[name]}")
        if name not in able:
            known = ", ".join(able) or "none: pip install 'magi-attention[blackwell]'"
            raise ValueError(f"backend {name!r} compiles nothing ahead of time; those that do: {known}")
    if not able:
        reasons = "".join(f"; {name}: {reason}" for name, reason in broken.items())
        todo = reasons or ": pip install 'magi-attention[blackwell]'"
        raise ValueError(f"no installed kernel backend compiles ahead of time{todo}")
    chosen = {name: each for name, each in able.items() if not wanted or name in wanted}
    return [
        Task(name, case)
        for selection in selections
        for name, backend in chosen.items()
        for case in backend.precompile_cases(selection)
    ]


def _unloadable(backends: Iterable[object]) -> dict[str, str]:
    """Why backends cannot be loaded, by name."""
    return {each.name: each.reason for each in backends if isinstance(each, UnloadableBackend)}


def without_kernels(selections: Sequence[KernelSelection], tasks: Sequence[Task]) -> list[str]:
    """What was selected and none of the tasks is for, such as ``"sm_80"`` or ``"--head-dim 512 on sm_90"``."""
    missing = []
    for selection in selections:
        cases = [task.case for task in tasks if task.case.arch == selection.arch]
        if not cases:
            missing.append(selection.arch)
            continue
        found: dict[str, tuple[Iterable[object], set[object]]] = {
            "--dtype": (selection.dtypes, {case.dtype for case in cases}),
            "--heads": (selection.heads, {(case.num_heads_q, case.num_heads_kv) for case in cases}),
            "--head-dim": (selection.head_dims, {(case.head_dim, case.head_dim_v) for case in cases}),
            "--direction": (selection.directions, {case.direction for case in cases}),
        }
        missing += [
            f"{option} {_text_of(each)} on {selection.arch}"
            for option, (selected, served) in found.items()
            for each in selected
            if each not in served
        ]
    return missing


def _text_of(value: object) -> str:
    """A value as the command line takes it."""
    if isinstance(value, torch.dtype):
        return next(name for name, dtype in DTYPES.items() if dtype == value)
    return "/".join(map(str, value)) if isinstance(value, tuple) else str(value)


def compile_all(tasks: Sequence[Task], jobs: int) -> Generator[Outcome]:
    """Compile in ``jobs`` processes, which are never shared by two architectures; outcomes come as they finish.

    The processes end with this one, and when the iterator is closed or interrupted.
    """
    for _, group in groupby(tasks, key=lambda task: task.case.arch):
        with _quiet_children(), ProcessPoolExecutor(jobs, get_context("spawn"), _begin) as pool:
            try:
                running = {pool.submit(compile_one, task): task for task in group}
                for future in as_completed(running):
                    yield _outcome_of(future, running[future])
            except BaseException:
                for child in active_children():  # else the pool would wait until they have compiled all
                    child.terminate()
                raise


def _begin() -> None:
    """Log as the parent does, leave it to it what an interrupt from the terminal means, and end when it does."""
    log_to_stderr()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def _quiet_children() -> AbstractContextManager[object]:
    """Let PyTorch's C++ code in processes that start inside log errors only, unless the user set what it logs.

    Kernels are compiled with tensors that have no memory. When asked where it lies, that code warns of a bug.
    """
    return mock.patch.dict(os.environ, {"TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ})


def compile_one(task: Task) -> Outcome:
    """Compile one task in this process."""
    backend = installed_backends()[task.backend]
    assert isinstance(backend, Precompiles)
    start = time.perf_counter()
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):  # compilers talk
            compiled = backend.precompile(task.case)
    except Exception as error:  # shown in the summary, whatever it is
        return Outcome(task, "failed", time.perf_counter() - start, f"{type(error).__name__}: {error}")
    return Outcome(task, "compiled" if compiled else "cached", time.perf_counter() - start)


def _outcome_of(future: "Future[Outcome]", task: Task) -> Outcome:
    try:
        return future.result()
    except BrokenProcessPool:
        return Outcome(task, "failed", reason=DIED)
