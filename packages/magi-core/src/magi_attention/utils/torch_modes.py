# SPDX-License-Identifier: Apache-2.0
"""PyTorch's modes, entered only where they are not on yet: entering one costs microseconds, which launches count."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

Params = ParamSpec("Params")
Result = TypeVar("Result")

_NOTHING = nullcontext()
_thread = threading.local()


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


def in_fake_tensor_mode() -> bool:
    """Whether new tensors have shapes alone, so that none of them may be kept for calls outside of the mode."""
    return any(isinstance(mode, FakeTensorMode) for mode in _get_current_dispatch_mode_stack())


def outside_fake_tensor_mode(function: Callable[Params, Result]) -> Callable[Params, Result]:
    """Decorate a function that tells other ranks something by tensors, which those without values can't."""

    @wraps(function)
    def run(*args: Params.args, **kwargs: Params.kwargs) -> Result:
        if not in_fake_tensor_mode():
            return function(*args, **kwargs)
        with _disable_current_modes():
            return function(*args, **kwargs)

    return run


def is_one_operator(x: Tensor) -> bool:
    """Whether a call of an attention, or of what goes with one, with ``x`` is to be one operator of PyTorch.

    A selective activation checkpoint keeps results of operators that a policy names, in place of computing them again,
    which those inside of an attention are not made for: they write into buffers. Fake tensors have no rows to send, and
    no place where a kernel could read. Other modes of torch's dispatcher, which may be on on one rank alone, see what
    runs.
    """
    if isinstance(x, FakeTensor):
        return True
    if not torch._C._len_torch_dispatch_stack():
        return False
    from torch.utils import checkpoint  # which has been imported then, if it is one

    modes = FakeTensorMode, checkpoint._CachingTorchDispatchMode, checkpoint._CachedTorchDispatchMode
    return any(isinstance(mode, modes) for mode in _get_current_dispatch_mode_stack())


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Make the GPU of a tensor the current one, for the driver too; nothing for a tensor on a CPU.

    In a thread that has used no GPU yet, as that of a first backward pass, PyTorch knows a current GPU, but the driver
    no context: it would refuse what is launched there.
    """
    if not x.is_cuda:
        return _NOTHING
    if x.get_device() != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    if not hasattr(_thread, "has_context"):
        torch.cuda.current_stream().record_event()  # by the CUDA runtime, which makes the context this thread's
        _thread.has_context = True
    return _NOTHING
