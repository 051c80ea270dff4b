# SPDX-License-Identifier: Apache-2.0
"""Every kernel that the package can launch, compiled for architectures that need not be here.

``python -m tests.blackwell.matrix docs/compiled-kernels.md`` compiles all of it, which takes long, and writes the
table of what came out; it exits with 1 if a kernel breaks a rule of :mod:`tests.blackwell.rules`.
"""

import io
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from magi_attention.kernels.protocol import PrecompileCase
from magi_kernels_blackwell import CUDNN_FLEX_BACKEND, FLASH_ATTENTION_4_BACKEND
from magi_kernels_blackwell.cases import NATIVE_MASKS, arch_number, request_of

BACKENDS = {"fa4": FLASH_ATTENTION_4_BACKEND, "cudnn_flex": CUDNN_FLEX_BACKEND}
ARCHS = ("sm_90", "sm_100")
ALIKE_ARCHS = ("sm_103",)
"""Architectures whose kernels are those of another but for the compiler's target: a short matrix will do."""

DIRECTIONS = ("forward", "backward")
DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
GROUPED, UNGROUPED, SINGLE = (8, 2), (8, 8), (8, 1)

# Beside plain ones; for 128 dims and grouped heads.
EXTRA_VARIANTS = {
    "fa4": (
        *(mask for mask in NATIVE_MASKS if mask not in ("full", "causal")),
        *(f"documents {mask}" for mask in NATIVE_MASKS),
        *("deterministic", "causal deterministic", "documents causal deterministic"),
        *("softcap", "causal softcap", "documents causal softcap"),
        *("dlse", "documents causal dlse"),
        *("short", "causal short", "full short"),
    ),
    "cudnn_flex": ("deterministic", "dlse", "max_logits", "short"),
}


@dataclass(frozen=True)
class Compiled:
    """What compiling a case wrote.

    Attributes:
        backend: ``"fa4"`` or ``"cudnn_flex"``.
        case: the case.
        objects: object files that were not there before; those that it shares with earlier cases are not listed.
        seconds: how long it took.
        error: why it failed, empty if it did not.
    """

    backend: str
    case: PrecompileCase
    objects: tuple[Path, ...]
    seconds: float
    error: str = ""


def full_matrix(arch: str) -> list[tuple[str, PrecompileCase]]:
    """All variants for 128 dims, and for the other head dims those that change the code most."""
    bf16, fp16 = torch.bfloat16, torch.float16
    wanted = []
    for backend, extras in EXTRA_VARIANTS.items():
        masks = ("", "full", "causal") if backend == "fa4" else ("",)
        for direction in DIRECTIONS:
            wanted += [
                (backend, PrecompileCase(arch, bf16, *heads, *dims, direction, mask))
                for dims in DIMS
                for heads, mask in [*((GROUPED, mask) for mask in masks), (UNGROUPED, "")]
            ]
            wanted.append((backend, PrecompileCase(arch, bf16, *SINGLE, 128, 128, direction)))
            wanted.append((backend, PrecompileCase(arch, fp16, *GROUPED, 128, 128, direction)))
            wanted += [(backend, PrecompileCase(arch, bf16, *GROUPED, 128, 128, direction, each)) for each in extras]
    return [(backend, case) for backend, case in wanted if makes_sense(backend, case)]


def short_matrix(arch: str) -> list[tuple[str, PrecompileCase]]:
    """A few cases, which together have every kind of kernel: for a check that should not take long."""
    bf16 = torch.bfloat16
    wanted = [
        *(("fa4", PrecompileCase(arch, bf16, *GROUPED, 128, 128, each)) for each in DIRECTIONS),
        *(("fa4", PrecompileCase(arch, bf16, *GROUPED, 128, 128, each, "documents causal")) for each in DIRECTIONS),
        *(("fa4", PrecompileCase(arch, bf16, *UNGROUPED, 64, 64, each)) for each in DIRECTIONS),
        ("fa4", PrecompileCase(arch, bf16, *UNGROUPED, 128, 128, "backward", "deterministic")),
        *(("cudnn_flex", PrecompileCase(arch, bf16, *GROUPED, 128, 128, each)) for each in DIRECTIONS),
    ]
    return [(backend, case) for backend, case in wanted if makes_sense(backend, case)]


def short_matrices() -> list[tuple[str, PrecompileCase]]:
    """The short matrix of every architecture."""
    return [case for arch in (*ARCHS, *ALIKE_ARCHS) for case in short_matrix(arch)]


def makes_sense(backend: str, case: PrecompileCase) -> bool:
    """Whether the backend supports a case, and its words say something in its direction."""
    words = case.variant.split()
    other = {"forward": ("deterministic", "dlse"), "backward": ("max_logits",)}[case.direction]
    supported = BACKENDS[backend].supports_on(arch_number(case.arch), request_of(case))
    return bool(supported) and not any(word in words for word in other)


def compile_matrix(cases: Sequence[tuple[str, PrecompileCase]], cache: Path) -> Iterator[Compiled]:
    """Compile into the empty folder ``cache``, in one process for each architecture, at the same time."""
    with ExitStack() as stack:
        start = {"max_workers": 1, "mp_context": get_context("spawn"), "initializer": keep_in, "initargs": (cache,)}
        archs = dict.fromkeys(case.arch for _, case in cases)
        pools = {arch: stack.enter_context(ProcessPoolExecutor(**start)) for arch in archs}
        running = [pools[case.arch].submit(_compile, backend, case, cache) for backend, case in cases]
        for done in as_completed(running):
            yield done.result()


def keep_in(cache: Path) -> None:
    """Let this process keep compiled kernels in ``cache``."""
    os.environ["MAGI_ATTENTION_FFA_FA4_CACHE_DIR"] = str(cache)


def _compile(backend: str, case: PrecompileCase, cache: Path) -> Compiled:
    before, started, error = _objects(cache, case), time.perf_counter(), ""
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
            BACKENDS[backend].precompile(case)
    except Exception as failure:  # the caller shows all that went wrong
        error = "".join(traceback.format_exception(failure, limit=-3))
    objects = sorted(_objects(cache, case) - before)
    return Compiled(backend, case, tuple(objects), time.perf_counter() - started, error)


def _objects(cache: Path, case: PrecompileCase) -> set[Path]:
    """The architecture's objects; its folder's name begins like it, and ends there or with a count."""
    folders = (each for each in cache.glob(f"*/{case.arch}*") if each.name.split("_")[1] == case.arch[3:])
    return {path for folder in folders for path in folder.rglob("*.o")}


def main(target: Path) -> int:
    """Compile all, say how it goes, write the page; returns the number of cases that are not as they should be."""
    from tests.blackwell.report import write_report

    cases = [case for arch in ARCHS for case in full_matrix(arch)]
    cases += [case for arch in ALIKE_ARCHS for case in short_matrix(arch)]
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(os.environ.get("COMPILE_KERNELS_CACHE") or folder)
        results = []
        for number, done in enumerate(compile_matrix(cases, cache), 1):
            results.append(done)
            say = f"FAILED\n{done.error}" if done.error else f"{len(done.objects)} new"
            print(f"{number}/{len(cases)} {done.backend} {done.case}: {done.seconds:.1f} s, {say}", flush=True)
        return write_report(results, target)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])) > 0)
