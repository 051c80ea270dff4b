# SPDX-License-Identifier: Apache-2.0
"""Launches that skip the wheels' Python code: it runs once for each kind of call, and is watched.

Both projects check arguments, choose a configuration, look up compiled kernels and allocate buffers in every call, for
some hundred microseconds. What comes of it depends on shapes, strides, dtypes and the mask alone. So the first call of
a kind is made without launching anything, while the kernels and arguments that would be launched are noted
(:func:`watched`). From these a :class:`PreparedForward` or :class:`PreparedBackward` launches the same kernels with
the tensors of this call and all later ones.

The order of the arguments is that of the exact versions that :mod:`magi_kernels_blackwell.wheels` names.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import RLock, get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor

from magi_attention.kernels.table_streams import StreamsOfTables

_watching = RLock()


def ignore(*_: object) -> None:
    """Nobody waits for the gradients of keys and values."""


class Launch(NamedTuple):
    """A compiled kernel, to be called on the current stream, and what it was to be called with."""

    kernel: Callable[..., object]
    arguments: tuple[Any, ...]


class _WatchedCache:
    """Stands for a project's cache of compiled kernels: those found are noted when called, instead of launched.

    Only in the thread that watches; others get the kernels. A project that launches what it has just compiled without
    taking it from its cache is not noticed here: see :func:`noted`.
    """

    def __init__(self, kept: Any) -> None:
        self.kept = kept
        self.launches: list[Launch] = []
        self._thread = get_ident()

    def __contains__(self, key: object) -> bool:
        return key in self.kept

    def __setitem__(self, key: object, kernel: object) -> None:
        self.kept[key] = kernel

    def __getitem__(self, key: object) -> Any:
        kernel = self.kept[key]
        if get_ident() != self._thread:
            return kernel
        return lambda *arguments: self.launches.append(Launch(direct(kernel), arguments))


def direct(kernel: Any) -> Callable[..., object]:
    """Return a compiled kernel without the layer for keyword arguments, which only a freshly compiled one has."""
    unwrap = getattr(kernel, "__tvm_ffi_object__", None)
    return unwrap() if unwrap is not None else kernel


@contextmanager
def watched(*functions: Any) -> Iterator[tuple[list[Launch], ...]]:
    """Note what functions of a project would launch, without launching it.

    Args:
        functions: each keeps compiled kernels in its attribute ``compile_cache``.

    Yields:
        the launches of each function, in order, filled in while the project's code runs. None where it only compiles.
    """
    with _watching:
        caches = [_WatchedCache(function.compile_cache) for function in functions]
        for function, cache in zip(functions, caches, strict=True):
            function.compile_cache = cache
        try:
            yield tuple(cache.launches for cache in caches)
        finally:
            for function, cache in zip(functions, caches, strict=True):
                function.compile_cache = cache.kept


def noted(launches: Sequence[Launch], *, is_tracing: bool) -> bool:
    """Whether launches were noted; where kernels are only compiled there are none.

    Raises:
        RuntimeError: kernels should have been launched, but nothing was noted. To go on without them would leave the
            results of all later calls as they lie in memory.
    """
    if not launches and not is_tracing:
        raise RuntimeError(
            "a kernel was prepared, but its launch was not noticed: the installed wheel launches otherwise"
        )
    return bool(launches)


def check_sums(main: Launch, after: Sequence[Launch], gradients: Sequence[Tensor]) -> None:
    """Check that all of a backward pass was noted: what sums gradients in float32 has a kernel that rounds these.

    Args:
        main: the kernel that computes, as of :class:`PreparedBackward`.
        after: those that round.
        gradients: of q, k and v, as they are wanted.

    Raises:
        RuntimeError: one is missing, or there are more.
    """
    num_sums = sum(
        main.arguments[place].dtype != gradient.dtype for place, gradient in zip((6, 7, 8), gradients, strict=True)
    )
    if len(after) != num_sums or num_sums == 2:  # of q alone, or of all three: as one kernel rounds those of k and v
        raise RuntimeError(
            f"a backward pass was prepared that sums up {num_sums} of its gradients in another dtype, but {len(after)} "
            "launches were noticed of kernels that round sums: the installed wheel launches otherwise"
        )


class PreparedForward(NamedTuple):
    """A forward pass's kernel, what it takes after the tensors and the softmax scale, and who reads the tables there.

    ``streams.add_current()`` comes before every launch.
    """

    kernel: Callable[..., object]
    rest: tuple[Any, ...]
    streams: StreamsOfTables

    @classmethod
    def of_launch(cls, launch: Launch, scale_at: int) -> "PreparedForward":
        """Keep of a launch what later ones share. ``scale_at`` is the place of the softmax scale."""
        rest = launch.arguments[scale_at + 1 :]
        return cls(launch.kernel, rest, StreamsOfTables(rest))


class Begun(NamedTuple):
    """What a backward pass computes before its main kernel: terms of each query, and a sum of dq for it to add to."""

    lse2: Tensor
    dpsum: Tensor
    dq_sum: Tensor


class PreparedBackward:
    """A backward pass: a kernel for statistics, the main one, and up to three that round sums of gradients.

    Args:
        before, main, after: what was noted of each. ``before`` takes out, dout, dpsum, lse, lse2 and the sum of dq
            first, ``main`` q, k, v, dout, lse2, dpsum, the sums of dq, dk and dv, and the softmax scale, and those of
            ``after`` a sum, a gradient and a factor.
        dlse_at: the place of dlse in ``before``.
        semaphores_at: the places of semaphores in ``main``, which begin as zeros; None where there are none.
    """

    def __init__(
        self, before: Launch, main: Launch, after: Sequence[Launch], dlse_at: int, semaphores_at: Sequence[int]
    ) -> None:
        self._before, self._main, self._after = before.kernel, main.kernel, [each.kernel for each in after]
        self._before_rest = list(before.arguments[6:])
        self._dlse_at = dlse_at - 6
        self._main_rest = list(main.arguments[10:])
        self._after_rest = [each.arguments[3:] for each in after]
        self._statistics, self._dq_sum = before.arguments[2].shape, _shape(before.arguments[5])
        self._sums = tuple(main.arguments[place].shape for place in (7, 8)) if len(after) == 3 else ()
        self._semaphores = {at - 10: shape for at in semaphores_at if (shape := _shape(main.arguments[at]))}
        self._before_rest[self._dlse_at] = None
        for at in self._semaphores:
            self._main_rest[at] = None
        self._streams = StreamsOfTables((self._before_rest, self._main_rest, self._after_rest))

    def __call__(
        self,
        tensors: Sequence[Tensor],
        lse: Tensor,
        dlse: Tensor | None,
        gradients: Sequence[Tensor],
        scale: float,
        keys_done: Callable[[], object] = ignore,
    ) -> None:
        """Launch with dout, q, k, v and out, and write dq, dk and dv; all shaped as in the noted call.

        ``keys_done`` is called once dk and dv are launched, before what is left to do for dq.
        """
        dq, *of_keys = gradients
        begun = self.begin(tensors, lse, dlse, dq)
        sums = self.sums_of_keys(lse, of_keys)
        self.compute(tensors, begun, sums, scale)
        self.round_keys(sums, of_keys, scale)
        keys_done()
        self.round_queries(begun, dq, scale)

    def begin(self, tensors: Sequence[Tensor], lse: Tensor, dlse: Tensor | None, dq: Tensor) -> Begun:
        """Launch what comes before the main kernel, which needs no keys and values."""
        self._streams.add_current()
        dout, _, _, _, out = tensors
        lse2, dpsum = lse.new_empty((2, *self._statistics)).unbind()
        dq_sum = dq if self._dq_sum is None else lse.new_empty(self._dq_sum)
        rest = self._before_rest
        if dlse is not None:
            rest = [*rest[: self._dlse_at], dlse, *rest[self._dlse_at + 1 :]]
        self._before(out, dout, dpsum, lse, lse2, dq_sum if self._dq_sum is not None else None, *rest)
        return Begun(lse2, dpsum, dq_sum)

    def sums_of_keys(self, like: Tensor, of_keys: Sequence[Tensor]) -> Sequence[Tensor]:
        """What the main kernel adds up gradients of keys and values in: zeros on the GPU of a tensor, or these."""
        return self._zeros(like) if self._sums else of_keys

    def compute(self, tensors: Sequence[Tensor], begun: Begun, sums: Sequence[Tensor], scale: float) -> None:
        """Launch the main kernel."""
        self._streams.add_current()
        dout, q, k, v, _ = tensors
        rest = self._main_rest
        if self._semaphores:
            rest = list(rest)
            for at, shape in self._semaphores.items():
                rest[at] = begun.lse2.new_zeros(shape, dtype=torch.int32)
        self._main(q, k, v, dout, *begun, *sums, scale, *rest)

    def round_keys(self, sums: Sequence[Tensor], of_keys: Sequence[Tensor], scale: float) -> None:
        """Launch what makes dk and dv of their sums, if these are others."""
        if self._sums:
            for number, (total, gradient, factor) in enumerate(zip(sums, of_keys, (scale, 1.0), strict=True), 1):
                self._after[number](total, gradient, factor, *self._after_rest[number])

    def round_queries(self, begun: Begun, dq: Tensor, scale: float) -> None:
        """Launch what makes dq of its sum."""
        if self._after:
            self._after[0](begun.dq_sum, dq, scale, *self._after_rest[0])

    def _zeros(self, like: Tensor) -> Sequence[Tensor]:
        """Sums of dk and dv, cleared by one kernel where both have one shape."""
        first, second = self._sums
        return (
            like.new_zeros((2, *first)).unbind() if first == second else (like.new_zeros(first), like.new_zeros(second))
        )


def layout_of(*tensors: Tensor) -> tuple[Any, ...]:
    """What kernels are compiled and launched by, beside the mask: device, dtype, shapes and strides."""
    first = tensors[0]
    return (first.device, first.dtype, *((x.shape, x.stride()) for x in tensors))


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape
