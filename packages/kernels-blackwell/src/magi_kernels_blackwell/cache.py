# SPDX-License-Identifier: Apache-2.0
"""The folder of compiled kernels: where it is, and how the wheels are told to use it.

Both projects keep compiled kernels on disk if they are told so before their modules are first imported. Users who set
these projects' own variables keep what they set.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from magi_attention.env.build import ffa_fa4_cache_dir


def cache_dir() -> Path:
    """The folder for compiled kernels: ``MAGI_ATTENTION_FFA_FA4_CACHE_DIR``, else a folder of the user's cache."""
    if chosen := ffa_fa4_cache_dir():
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "magi_attention" / "cute_kernels"


@contextmanager
def kept_in(folder: str, variable_prefix: str) -> Iterator[None]:
    """Import a project inside, to have it keep compiled kernels in a folder; it reads its settings while imported.

    If it was imported before, this changes nothing.

    Args:
        folder: a folder below :func:`cache_dir`. Kernels of different architectures need different ones: neither
            project tells all of them apart.
        variable_prefix: what the project's own environment variables begin with.
    """
    enabled, directory = f"{variable_prefix}_CUTE_DSL_CACHE_ENABLED", f"{variable_prefix}_CUTE_DSL_CACHE_DIR"
    if enabled in os.environ:
        yield
        return
    before = os.environ.get(directory)
    os.environ |= {enabled: "1", directory: str(cache_dir() / folder)}
    try:
        yield
    finally:
        del os.environ[enabled], os.environ[directory]
        if before is not None:
            os.environ[directory] = before
