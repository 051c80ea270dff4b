# SPDX-License-Identifier: Apache-2.0
"""The only door to cudnn.flex_attention: imports it when a kernel is first needed, with the cache on disk set up."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from threading import RLock
from types import ModuleType
from typing import Any, NamedTuple

import torch

from magi_kernels_blackwell.cache import kept_in
from magi_kernels_blackwell.objects import share_objects
from magi_kernels_blackwell.wheels import capability_of

VARIABLE_PREFIX = "FLEX_ATTENTION"
"""Of the environment variables of ``cudnn.flex_attention``."""

logger = logging.getLogger(__name__)
_silencing = RLock()


class Library(NamedTuple):
    """What the backend uses.

    Attributes:
        create_mask_plan: builds tile lists and bit masks on the device.
        aligned: returns a tensor, or a copy that the kernels can read: ``aligned(x, align_bytes)``.
        dispatch: the module that compiles and launches kernels.
        builder: the module that builds plans.
    """

    create_mask_plan: Callable[..., Any]
    aligned: Callable[..., Any]
    dispatch: ModuleType
    builder: ModuleType


def load(device: torch.device) -> Library:
    """Import cudnn.flex_attention for the GPU ``device``."""
    return load_for(capability_of(device))


@cache
def load_for(arch: int) -> Library:
    """Import cudnn.flex_attention. Each architecture has its folder: small kernels' names on disk don't tell it."""
    with kept_in(f"cudnn_flex/sm_{arch}", VARIABLE_PREFIX):
        from cudnn.flex_attention import create_mask_plan, dispatch
        from cudnn.flex_attention.plan import builder
        from cudnn.flex_attention.runtime import compile_cache
        from cudnn.flex_attention.runtime.dsl_utils import maybe_contiguous

    share_objects(compile_cache.JITPersistentCache)
    return Library(create_mask_plan, maybe_contiguous, dispatch, builder)


@contextmanager
def quiet(library: Library) -> Iterator[None]:
    """Log what the library prints while it compiles, instead of letting it write to stdout."""

    def log(*words: object) -> None:
        logger.info(" ".join(map(str, words)))

    modules = (library.dispatch, library.builder)
    with _silencing:
        for module in modules:
            module.print = log  # type: ignore[attr-defined]
        try:
            yield
        finally:
            for module in modules:
                del module.print
