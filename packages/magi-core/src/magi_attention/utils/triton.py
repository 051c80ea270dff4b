# SPDX-License-Identifier: Apache-2.0
"""Whether Triton is there, which comes with PyTorch's CUDA builds; modules that need it are imported only then."""

from functools import cache
from importlib.util import find_spec


@cache
def has_triton() -> bool:
    """Whether Triton is installed; it is not imported."""
    return find_spec("triton") is not None
