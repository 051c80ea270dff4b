# SPDX-License-Identifier: Apache-2.0
"""Whether Triton is there, which comes with PyTorch's CUDA builds, and launches of its kernels that cost less.

Triton looks at every argument of every launch, to find what it has compiled for such. What a training launches is the
same again and again, and is found by a key that its caller has at hand.

Modules that need Triton are imported only where it is there.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from magi_attention.utils.torch_modes import on_device_of


@cache
def has_triton() -> bool:
    """Whether Triton is installed; it is not imported."""
    return find_spec("triton") is not None


def next_power_of_2(number: int) -> int:
    """The least power of 2 that is at least ``number``, which must be positive."""
    return 1 << (number - 1).bit_length()


MOST_KNOWN = 4096
"""Launches that are kept, of which a mask has some ten."""

_NOTHING = nullcontext()
_known: dict[object, tuple[Callable[..., object], tuple[Any, ...]]] = {}


def relaunch(key: object, device_index: int, addresses: Sequence[int], free: tuple[int, ...]) -> bool:
    """Launch again what :func:`launch` was given with a key; nothing of it is derived anew.

    Args:
        key: what the launch depends on, but for addresses and ``free``.
        device_index: of the tensors' GPU.
        addresses: of the tensors, all of this GPU: Triton looks where tensors are, not where addresses lead.
        free: as of the launch.

    Returns:
        False, and nothing is done, where no such launch is kept, or where one of the addresses is not aligned as its
        tensors were.
    """
    known = _known.get((device_index, key))
    union = 0
    for each in addresses:
        union |= each
    if known is None or union % 16:
        return False
    run, rest = known
    # There was a launch, so that PyTorch need not be asked whether CUDA has been started.
    with _NOTHING if torch._C._cuda_getDevice() == device_index else torch.cuda.device(device_index):
        run(*addresses, *free, *rest, stream=torch._C._cuda_getCurrentRawStream(device_index))
    return True


def launch(
    function: Any,
    grid: tuple[int, int, int],
    tensors: tuple[Tensor, ...],
    free: tuple[int, ...],
    fixed: tuple[int, ...],
    constants: dict[str, Any],
    key: object = None,
    **options: Any,
) -> None:
    """Launch a kernel on the current stream of the tensors' GPU.

    Args:
        function: the jitted kernel. It takes the tensors, ``free``, ``fixed`` and the constants, in this order.
        grid: numbers of programs.
        tensors: what it reads and writes.
        free: integers that it is not specialized on, which fit 32 bits.
        fixed: other integers, of which there are few combinations.
        constants: of the kernel.
        key: by which :func:`relaunch` finds the launch; None if it shall not.
        options: of the compiler.
    """
    device = tensors[0].get_device()
    with on_device_of(tensors[0]):  # Triton launches on the current one
        compiled = function[grid](*tensors, *free, *fixed, **constants, **options)
    # The interpreter compiles nothing; and tensors that are not aligned as usual have kernels of their own.
    if key is not None and compiled is not None and not any(each.data_ptr() % 16 for each in tensors):
        if len(_known) >= MOST_KNOWN:
            _known.clear()
        _known[device, key] = compiled[grid], (*fixed, *constants.values())
