# SPDX-License-Identifier: Apache-2.0
"""The folder of compiled kernels, and how the wheels are told to use it.

Both projects keep compiled kernels on disk if they are told so before their modules are first imported. Users who set
these projects' own variables keep what they set.
"""

import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import RLock

from magi_attention.env.build import kernel_cache_dir
from magi_attention.utils.folders import why_unwritable

logger = logging.getLogger(__name__)
_loading = RLock()
_folders: dict[str, str] = {}
_unkept: list[str] = []


@contextmanager
def kept_in(folder: str, variable_prefix: str) -> Iterator[None]:
    """Import a project inside, to have it keep compiled kernels in a folder; it reads its settings while imported.

    One thread at a time is inside. If the project was imported before, this changes nothing. If the folder cannot be
    written, kernels are found there all the same, but new ones are kept for this process alone, of which a warning
    tells.

    Args:
        folder: a folder below :func:`magi_attention.env.build.kernel_cache_dir`; the host's kind of processor is added
            to its name, since kernels have a part that runs there. Kernels of different architectures need different
            ones: neither project tells all of them apart.
        variable_prefix: what the project's own environment variables begin with.

    Raises:
        RuntimeError: If this process has loaded the project for kernels of another folder already.
    """
    with _loading:  # variables are the process's, and threads that drive a GPU each begin at the same time
        yield from _kept_in(folder, variable_prefix)


def _kept_in(folder: str, variable_prefix: str) -> Iterator[None]:
    if (first := _folders.get(variable_prefix, folder)) != folder:
        raise RuntimeError(
            f"this process has loaded {first}, and cannot load {folder} as well: GPUs of different architectures, or on"
            " Blackwell of different numbers of multiprocessors, need a process each"
        )
    enabled, directory = f"{variable_prefix}_CUTE_DSL_CACHE_ENABLED", f"{variable_prefix}_CUTE_DSL_CACHE_DIR"
    if enabled in os.environ:
        yield
        _folders[variable_prefix] = folder
        return
    before = os.environ.get(directory)
    os.environ |= {enabled: "1", directory: str(_writable(_of_this_host(folder)))}
    try:
        yield
        _folders[variable_prefix] = folder
    finally:
        del os.environ[enabled], os.environ[directory]
        if before is not None:
            os.environ[directory] = before


def why_switched_off(variable_prefix: str) -> str:
    """Say by which of its own variables a project keeps no kernels on disk; empty if it does."""
    setting = os.environ.get(enabled := f"{variable_prefix}_CUTE_DSL_CACHE_ENABLED", "1")
    return "" if setting == "1" else f"kernels are not kept on disk while {enabled} is {setting!r}: unset it"


def why_unkept() -> str:
    """Say why kernels that this process compiles cannot all be written to disk; empty if they can."""
    return f"kernels cannot be kept in {kernel_cache_dir()}: {_unkept[0]}" if _unkept else ""


def cannot_keep(reason: str) -> None:
    """Remember that a kernel cannot be kept on disk, and warn of it once for each reason."""
    _unkept.append(reason)
    _warn_of(kernel_cache_dir(), reason)


def _of_this_host(folder: str) -> Path:
    return kernel_cache_dir() / f"{folder}_{platform.machine()}"


def _writable(folder: Path) -> Path:
    """Return the folder, or if it cannot be written one of this process that shows what it holds."""
    if not (reason := why_unwritable(folder)):
        return folder
    cannot_keep(reason)
    return Path(_linked(folder).name)


@cache
def _warn_of(folder: Path, reason: str) -> None:
    logger.warning(
        "compiled kernels can't be kept in %s (%s): every process compiles those that are not there; "
        "MAGI_ATTENTION_FFA_FA4_CACHE_DIR names another folder",
        folder,
        reason,
    )


@cache
def _linked(folder: Path) -> TemporaryDirectory[str]:
    """Make a folder with links to all kernels of another; it lasts as long as the process."""
    own = TemporaryDirectory(prefix="magi_kernels_")
    for kernel in folder.rglob("*.o"):
        link = own.name / kernel.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(kernel.resolve())
    return own
