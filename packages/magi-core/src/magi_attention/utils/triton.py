# SPDX-License-Identifier: Apache-2.0
"""Whether Triton is there, which comes with PyTorch's CUDA builds, and launches of its kernels that cost less.

Modules that need Triton are imported only where it is there.
"""

from functools import cache
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from magi_attention.utils.torch_modes import on_device_of

_compiled: dict[object, Any] = {}


@cache
def has_triton() -> bool:
    """Whether Triton is installed; it is not imported."""
    return find_spec("triton") is not None


def next_power_of_2(number: int) -> int:
    """The least power of 2 that is at least ``number``, which must be positive."""
    return 1 << (number - 1).bit_length()


def launch(
    function: Any,
    grid: tuple[int, int, int],
    tensors: tuple[Tensor, ...],
    free: tuple[int, ...],
    fixed: tuple[int, ...],
    constants: dict[str, Any],
    **options: Any,
) -> None:
    """Launch a kernel on the current stream of the tensors' GPU.

    Triton looks at every argument of every launch, to find what it has compiled for such. This finds it in less time.

    Args:
        function: the jitted kernel. It takes the tensors, ``free``, ``fixed`` and the constants, in this order.
        grid: numbers of programs.
        tensors: what it reads and writes.
        free: integers that it is not specialized on, which fit 32 bits.
        fixed: other integers, of which there are few combinations.
        constants: of the kernel.
        options: of the compiler.
    """
    addresses = 0
    for each in tensors:
        addresses |= each.data_ptr()
    key = function, tensors[0].get_device(), fixed, *constants.values(), *[each.dtype for each in tensors]
    compiled = None if addresses % 16 else _compiled.get(key)
    with on_device_of(tensors[0]):  # Triton launches on the current one
        if compiled is not None:
            compiled[grid](*tensors, *free, *fixed, *constants.values())
            return
        launched = function[grid](*tensors, *free, *fixed, **constants, **options)
    # The interpreter compiles nothing; and tensors that are not aligned as usual have kernels of their own.
    if launched is not None and not addresses % 16:
        _compiled[key] = launched
