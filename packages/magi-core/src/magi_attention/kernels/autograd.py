# SPDX-License-Identifier: Apache-2.0
"""What autograd functions around kernels need."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from magi_attention.utils.tensors import in_memory
from magi_attention.utils.torch_modes import without_grad

Pass = TypeVar("Pass", bound=Callable[..., Any])

_NOTHING = nullcontext()


class KernelFunction(torch.autograd.Function):
    """An autograd function around kernels or collectives, which know nothing of the transforms of ``torch.func``."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Do what PyTorch does, except that its error would ask for methods that don't help."""
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                "attention, dispatch, undispatch and roll can't be used under the transforms of torch.func (vmap, grad "
                "and others): pack samples into one sequence as documents, and call torch.autograd.grad"
            )
        return super().apply(*args)


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Keep autocast from changing the dtypes inside a kernel, which chose its precision by its inputs."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return _NOTHING
    return torch.autocast(x.device.type, enabled=False)


def only_once_differentiable(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Decorate the backward pass of a function whose second derivative would be needed, but isn't there.

    PyTorch's ``once_differentiable`` returns gradients that depend on nothing: a product of a Hessian and a vector, by
    ``torch.autograd.grad`` for some parameters, would leave out silently what goes through the function.
    """
    differentiate = without_grad(backward)

    @wraps(backward)
    def run(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        if not torch.is_grad_enabled():  # nobody asked for a graph of the backward pass
            return differentiate(ctx, *gradients)
        context = _UnpackedContext(ctx)
        found = differentiate(context, *gradients)
        causes = [x for x in (*gradients, *context.saved_tensors) if isinstance(x, Tensor) and x.requires_grad]
        if not causes:
            return found
        return tuple(_Last.apply(x, *causes) if isinstance(x, Tensor) else x for x in found)

    return run


class _UnpackedContext:
    """A context whose saved tensors may be read twice, which those of checkpoints may not."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx
        self.saved_tensors: tuple[Tensor | None, ...] = ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


class _Last(torch.autograd.Function):
    """A tensor that depends on ``causes`` by a function which can't be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *causes: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(
            "attention has no second derivative, nor have dispatch, undispatch and roll: their gradients, taken with "
            "create_graph=True, can't be differentiated"
        )


def on_real_memory(function: Pass) -> Pass:
    """Decorate a pass of an autograd function that hands its tensors' memory to kernels or collectives.

    What a functional collective returned, and nobody has waited for, has no memory of its own: it stands for a tensor
    that is still coming. Tensor parallelism makes such inputs, and such gradients. The memory of a tensor that PyTorch
    notes as conjugated or negated, as the imaginary part of a conjugated one, holds other numbers than the tensor.
    Neither have tensors memory that a compiler traces, as compiled autograd does with backward passes: it must leave
    this one out.
    """

    @wraps(function)
    def run(ctx: Any, *args: Any) -> Any:
        functional = sys.modules.get("torch.distributed._functional_collectives")  # without it there are none
        if functional is not None and any(isinstance(x, functional.AsyncCollectiveTensor) for x in args):
            args = tuple(x.wait() if isinstance(x, functional.AsyncCollectiveTensor) else x for x in args)
        return function(ctx, *[in_memory(x) if isinstance(x, Tensor) else x for x in args])

    untraced = torch._disable_dynamo(run)  # which imports the compiler when it is called

    @wraps(function)
    def leave_out(ctx: Any, *args: Any) -> Any:
        return untraced(ctx, *args) if torch.compiler.is_compiling() else run(ctx, *args)

    return cast(Pass, leave_out)


def owned(x: Tensor) -> Tensor:
    """``x``, and not as a view: an output that is a view may not be modified in place by its user.

    ``x`` and what it is a view of must be new.
    """
    return x if x._base is None else x.detach()
