# SPDX-License-Identifier: Apache-2.0
"""The only door to FlashAttention-4: imports it when a kernel is first needed, with the cache on disk set up."""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch

from magi_kernels_blackwell.cache import kept_in
from magi_kernels_blackwell.objects import share_objects
from magi_kernels_blackwell.wheels import HOPPER, capability_of, num_multiprocessors

VARIABLE_PREFIX = "FLASH_ATTENTION"
"""Of FlashAttention-4's own environment variables."""


class Library(NamedTuple):
    """What the backend uses.

    Attributes:
        forward, backward: FlashAttention-4's entry points without autograd.
        backward_parts: those of the backward pass's kernels: before the main one, the main one, after it.
        sparse_tensors: its class of block lists.
        aligned: returns a tensor, or a copy that the kernels can read.
        is_tracing: whether launches are not made, only kernels compiled.
        masks: :mod:`magi_kernels_blackwell.fa4.masks`.
        grouped: :mod:`magi_kernels_blackwell.fa4.grouped_kernel`.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    backward_parts: tuple[Any, Any, Any]
    sparse_tensors: Callable[..., Any]
    aligned: Callable[..., Any]
    is_tracing: Callable[[], bool]
    masks: Any
    grouped: Any


def load(device: torch.device) -> Library:
    """Import FlashAttention-4 for the GPU ``device``."""
    return load_for(capability_of(device), num_multiprocessors(device))


@cache
def load_for(arch: int, num_sms: int) -> Library:
    """Import FlashAttention-4, whose kernels are kept in :func:`folder_of` the architecture."""
    with kept_in(folder_of(arch, num_sms), VARIABLE_PREFIX):
        from flash_attn.cute import cache_utils, interface
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

        from magi_kernels_blackwell.fa4 import grouped_kernel, masks

    share_objects(cache_utils.JITPersistentCache)
    # Its kernels take a structure that the compiler cannot describe, and need not: of which that tells at each kernel.
    warnings.filterwarnings("ignore", "Argument aux_data .* cannot be converted to a JitArgument", UserWarning)
    return Library(
        interface._flash_attn_fwd,
        interface._flash_attn_bwd,
        (interface._bwd_preprocess, interface._flash_attn_bwd, interface._bwd_postprocess_convert),
        BlockSparseTensorsTorch,
        interface.maybe_contiguous,
        interface.is_fake_mode,
        masks,
        grouped_kernel,
    )


def folder_of(arch: int, num_sms: int) -> str:
    """Where to keep kernels of an architecture.

    Some kernels for Blackwell are launched with as many thread blocks as there are multiprocessors, a number that is
    compiled into them; those for Hopper with one for each tile.
    """
    return f"flash_attention/sm_{arch}" if arch == HOPPER else f"flash_attention/sm_{arch}_{num_sms}"
