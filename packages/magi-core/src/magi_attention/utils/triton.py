# SPDX-License-Identifier: Apache-2.0
"""Whether Triton is there, which comes with PyTorch's CUDA builds, and launches of its kernels that cost less.

Modules that need Triton are imported only where it is there.
"""

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

_compiled: dict[object, Any] = {}


@cache
def has_triton() -> bool:
    """Whether Triton is installed; it is not imported."""
    return find_spec("triton") is not None


def launch(
    function: Any, kind: object, grid: tuple[int, int, int], arguments: tuple[Any, ...], constants: dict[str, Any]
) -> None:
    """Launch a kernel on the current GPU and stream.

    Triton looks at every argument of every launch, to find what it has compiled for such. Here this is found by the
    ``kind`` and the constants alone, which takes a third of the time.

    Args:
        function: the jitted kernel; it must not be specialized on numbers or alignments.
        kind: all that it is compiled for beside the constants: the tensors' dtypes.
        grid: numbers of programs.
        arguments: in order, without the constants.
        constants: of the kernel, which it takes last.
    """
    key = (function, kind, torch.cuda.current_device() if torch.cuda.is_available() else -1, *constants.values())
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[grid](*arguments, *constants.values())
        return
    launched = function[grid](*arguments, **constants)
    if launched is not None:  # the interpreter compiles nothing
        _compiled[key] = launched
