# SPDX-License-Identifier: Apache-2.0
"""What autograd functions around kernels need."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_NOTHING = nullcontext()


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Keep autocast from changing the dtypes inside a kernel, which chose its precision by its inputs."""
    if not torch.is_autocast_enabled(x.device.type):
        return _NOTHING
    return torch.autocast(x.device.type, enabled=False)


def owned(x: Tensor) -> Tensor:
    """``x``, and not as a view: an output that is a view may not be modified in place by its user.

    ``x`` and what it is a view of must be new.
    """
    return x if x._base is None else x.detach()
