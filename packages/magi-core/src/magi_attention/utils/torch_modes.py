# SPDX-License-Identifier: Apache-2.0
"""PyTorch's modes, entered only where they are not on yet: entering one costs microseconds, which launches count."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Params = ParamSpec("Params")
Result = TypeVar("Result")

_NOTHING = nullcontext()


def without_grad(function: Callable[Params, Result]) -> Callable[Params, Result]:
    """Decorate a function as :func:`torch.no_grad` does."""

    @wraps(function)
    def run(*args: Params.args, **kwargs: Params.kwargs) -> Result:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        with torch.no_grad():
            return function(*args, **kwargs)

    return run


def outside_inference_mode(function: Callable[Params, Result]) -> Callable[Params, Result]:
    """Decorate a function whose tensors are kept for later calls: inference mode would forbid to train with them."""

    @wraps(function)
    def run(*args: Params.args, **kwargs: Params.kwargs) -> Result:
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():  # compilers can't trace the question
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return run


def sees_operators() -> bool:
    """Whether somebody looks at the operators that are called: a compiler, or a mode of torch's dispatcher.

    Selective activation checkpoints are such a mode. They keep results of operators that a policy names, in place of
    computing them again, which those inside of an attention are not made for: they write into buffers.
    """
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Make the GPU of a tensor the current one; nothing for a tensor on a CPU."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(x.device)
