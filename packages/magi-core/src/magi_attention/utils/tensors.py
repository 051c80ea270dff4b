# SPDX-License-Identifier: Apache-2.0
"""What may pass for a tensor, and what its memory holds."""

import sys
from typing import Any

import torch
from torch import Tensor

from magi_attention.common.errors import MagiTypeError


def check_plain_tensor(name: str, x: Any) -> None:
    """Raise unless ``x`` is a dense tensor of this process's own rows: a DTensor would communicate by itself.

    Raises:
        TypeError: something else; the message says how to get the tensor of a DTensor or of a nested one.
    """
    if not isinstance(x, Tensor):
        raise MagiTypeError(f"{name} must be a tensor, not {type(x).__name__}")
    if x.is_nested:
        raise MagiTypeError(
            f"{name} is a nested tensor; pass its packed rows, {name}.values(), with {name}.offsets() as cu_seqlens"
        )
    if x.layout is not torch.strided:
        raise MagiTypeError(f"{name} has the layout {x.layout}; pass {name}.to_dense()")
    distributed = sys.modules.get("torch.distributed.tensor")  # it takes long to import, and only who did has DTensors
    if distributed is not None and isinstance(x, distributed.DTensor):
        raise MagiTypeError(
            f"{name} is a DTensor with placements {x.placements}; pass {name}.to_local(), and {name}.full_tensor() "
            "where the whole sequence is asked for"
        )


def in_memory(x: Tensor) -> Tensor:
    """``x`` without a conjugation or negation that PyTorch only notes, which who reads its memory would leave out."""
    return x.detach().resolve_conj().resolve_neg() if x.is_conj() or x.is_neg() else x
