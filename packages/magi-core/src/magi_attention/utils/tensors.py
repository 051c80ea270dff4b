# SPDX-License-Identifier: Apache-2.0
"""What may pass for a tensor."""

import sys
from typing import Any

from torch import Tensor

from magi_attention.common.errors import MagiTypeError


def check_plain_tensor(name: str, x: Any) -> None:
    """Raise unless ``x`` is a tensor of this process's own rows: a DTensor would communicate by itself.

    Raises:
        TypeError: something else; the message says how to get the tensor of a DTensor.
    """
    if not isinstance(x, Tensor):
        raise MagiTypeError(f"{name} must be a tensor, not {type(x).__name__}")
    distributed = sys.modules.get("torch.distributed.tensor")  # it takes long to import, and only who did has DTensors
    if distributed is not None and isinstance(x, distributed.DTensor):
        raise MagiTypeError(
            f"{name} is a DTensor with placements {x.placements}; pass {name}.to_local(), and {name}.full_tensor() "
            "where the whole sequence is asked for"
        )
