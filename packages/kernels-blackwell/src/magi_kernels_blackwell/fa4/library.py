# SPDX-License-Identifier: Apache-2.0
"""The only door to FlashAttention-4: imports it when a kernel is first needed, with the cache on disk set up."""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch

from magi_kernels_blackwell.cache import kept_in
from magi_kernels_blackwell.wheels import capability_of, num_multiprocessors


class Library(NamedTuple):
    """What the backend uses.

    Attributes:
        forward, backward: FlashAttention-4's entry points without autograd.
        sparse_tensors: its class of block lists.
        masks: :mod:`magi_kernels_blackwell.fa4.masks`.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    sparse_tensors: Callable[..., Any]
    masks: Any


def load(device: torch.device) -> Library:
    """Import FlashAttention-4 for the GPU ``device``."""
    return load_for(capability_of(device), num_multiprocessors(device))


@cache
def load_for(arch: int, num_sms: int) -> Library:
    """Import FlashAttention-4. Some kernels are compiled for a number of multiprocessors, so each has its folder."""
    with kept_in(f"flash_attention/sm_{arch}_{num_sms}", "FLASH_ATTENTION"):
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
        from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

        from magi_kernels_blackwell.fa4 import masks

    return Library(_flash_attn_fwd, _flash_attn_bwd, BlockSparseTensorsTorch, masks)
