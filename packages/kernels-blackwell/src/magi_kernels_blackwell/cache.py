# SPDX-License-Identifier: Apache-2.0
"""The folder of compiled kernels: where it is, and how the wheels are told to use it.

Both projects keep compiled kernels on disk if they are told so before their modules are first imported. Users who set
these projects' own variables keep what they set.
"""

import os
from importlib import import_module
from pathlib import Path

from magi_attention.env.build import ffa_fa4_cache_dir


def cache_dir() -> Path:
    """The folder for compiled kernels: ``MAGI_ATTENTION_FFA_FA4_CACHE_DIR``, else a folder of the user's cache."""
    if chosen := ffa_fa4_cache_dir():
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "magi_attention" / "cute_kernels"


def use_cache(module_name: str, variable_prefix: str, folder: str) -> None:
    """Let a project whose cache settings live in ``module_name`` keep compiled kernels in ``folder``.

    Must be called before anything else of that project is imported; later, it changes nothing.

    Args:
        module_name: the module with the constants ``CUTE_DSL_CACHE_ENABLED`` and ``CUTE_DSL_CACHE_DIR``.
        variable_prefix: what the project's own environment variables begin with.
        folder: a folder below :func:`cache_dir`.
    """
    if f"{variable_prefix}_CUTE_DSL_CACHE_ENABLED" in os.environ:
        return
    settings = import_module(module_name)
    settings.CUTE_DSL_CACHE_ENABLED = True  # type: ignore[attr-defined]
    settings.CUTE_DSL_CACHE_DIR = str(cache_dir() / folder)  # type: ignore[attr-defined]
