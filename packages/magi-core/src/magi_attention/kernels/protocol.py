# SPDX-License-Identifier: Apache-2.0
"""What an attention kernel backend must offer. Shape suffixes: t tokens, h heads, d head dim; q queries, k keys."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from magi_attention.common.logsumexp import accumulation_dtype
from magi_attention.common.slices import SliceTable

Direction = Literal["forward", "backward"]


@dataclass(frozen=True)
class AttentionRequest:
    """What a caller is going to ask of a backend: all that decides whether it can, and how fast.

    Attributes:
        device: where the tensors are.
        dtype: their data type.
        num_heads_q: query heads.
        num_heads_kv: key and value heads.
        head_dim: size of a head of queries and keys.
        head_dim_v: size of a head of values.
        softcap: whether scores are capped.
        max_logits: whether the largest score per head is wanted; only ever in the forward direction.
        deterministic: whether the same bits are wanted in every run.
        direction: the pass; forward and backward of one attention may be of different backends.
        mask_class: one of :data:`magi_attention.kernels.mask_class.MASK_CLASSES`. It tells how fast a backend will be,
            never whether it can: a backend that supports a request supports every mask.
        num_pairs: how many (query, key) pairs the mask keeps; None where that is not known. It tells the same, and is
            another for almost every mask: no key of what is kept for long.
    """

    device: torch.device
    dtype: torch.dtype
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    head_dim_v: int
    softcap: bool = False
    max_logits: bool = False
    deterministic: bool = False
    direction: Direction = "forward"
    mask_class: str = "general"
    num_pairs: int | None = None

    @classmethod
    def of_tensors(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        softcap: float = 0.0,
        max_logits: bool = False,
        deterministic: bool = False,
    ) -> "AttentionRequest":
        """What q ``[tq, hq, d]``, k ``[tk, hk, d]`` and v ``[tk, hk, dv]`` ask for."""
        return cls(
            device=q.device,
            dtype=q.dtype,
            num_heads_q=q.shape[1],
            num_heads_kv=k.shape[1],
            head_dim=q.shape[2],
            head_dim_v=v.shape[2],
            softcap=softcap > 0,
            max_logits=max_logits,
            deterministic=deterministic,
        )

    def toward(self, direction: Direction, mask_class: str | None = None) -> "AttentionRequest":
        """The same attention in the given direction, by default of the same mask class."""
        return replace(
            self,
            direction=direction,
            max_logits=self.max_logits and direction == "forward",
            mask_class=mask_class or self.mask_class,
        )


class Support(NamedTuple):
    """Whether a backend can serve a request; if not, ``reason`` says why and what would help."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


@dataclass(frozen=True)
class AttentionCall:
    """One attention over all slices of a stage.

    Attributes:
        slices: which (query, key) pairs count, in rows of the given q and k; no pair twice.
        softmax_scale: factor on q·k.
        softcap: if positive, scores become ``softcap * tanh(score / softcap)``.
        deterministic: the same bits in every run, also in the backward pass.
        max_logits: also return the largest scaled, uncapped score per head.
        sm_margin: multiprocessors of the GPU to leave to others, where a backend can.
        first_keys: runs ``(start, stop)`` of rows of k, ascending and apart, whose gradients somebody waits for: a
            backend that can computes them before some others in the backward pass. See :class:`FinishesKeysFirst`.
    """

    slices: SliceTable
    softmax_scale: float
    softcap: float = 0.0
    deterministic: bool = False
    max_logits: bool = False
    sm_margin: int = 0
    first_keys: tuple[tuple[int, int], ...] = ()


class AttentionResult(NamedTuple):
    """A stage's output.

    Attributes:
        out: ``[tq, hq, dv]`` contiguous, 0 for rows without keys; q's dtype, or the precision it was accumulated in.
        lse: ``[tq, hq]`` float32 (float64 for float64 inputs), natural logarithm, -inf for rows without keys.
        max_logits: ``[hq]`` of lse's dtype, -inf without any pair; None unless asked for.
    """

    out: Tensor
    lse: Tensor
    max_logits: Tensor | None = None


def attend_to_nothing(q: Tensor, v: Tensor, max_logits: bool = False) -> AttentionResult:
    """Return the result of queries ``[tq, hq, d]`` without any key; ``v`` tells the head dim of the output."""
    lse = q.new_full(q.shape[:2], -torch.inf, dtype=accumulation_dtype(q))
    largest = lse.new_full(lse.shape[1:], -torch.inf) if max_logits else None
    return AttentionResult(q.new_zeros(*q.shape[:2], v.shape[-1]), lse, largest)


@runtime_checkable
class KernelBackend(Protocol):
    """A family of attention kernels. ``BACKEND`` objects of this type stand behind the entry points."""

    name: str

    def supports(self, request: AttentionRequest) -> Support:
        """Say whether this backend can serve ``request`` on this machine, without compiling or allocating."""

    def expected_tflops(self, request: AttentionRequest) -> float:
        """The speed to expect of a request that is supported: the fastest backend is chosen.

        Measured figures by architecture, direction, mask class and head dim, in 10^12 floating point operations per
        second over the pairs that the mask keeps: ``4 * pairs * heads * head_dim`` operations forward, 2.5 times that
        backward. Must be quick: no compiling, no measuring.
        """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> AttentionResult:
        """Attend q ``[tq, hq, d]`` to k ``[tk, hk, d]`` and v ``[tk, hk, dv]``; query head h reads h // (hq/hk)."""

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dlse: Tensor | None,
        call: AttentionCall,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Differentiate one stage of an attention whose *final* output is ``out``, ``lse``.

        With ``p = exp(score - lse)``: ``dscore = p * (dout·v - rowsum(dout * out) + dlse)``. The final ``out`` and
        ``lse`` cover all stages (and a sink), so the stages' gradients simply add up. Rows with ``lse = -inf`` have
        gradient 0.

        Returns ``dq, dk, dv``, in the inputs' dtype or the precision they were accumulated in.
        """


@runtime_checkable
class WritesInPlace(Protocol):
    """The optional ability of a backend to write where its caller wants the results of some of a sequence's queries.

    What is returned is as of ``forward`` and ``backward``; where a result is not the given tensor, as kernels may not
    be able to write everywhere, the caller copies it.
    """

    def forward_into(
        self, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
    ) -> AttentionResult:
        """:meth:`KernelBackend.forward`, written to the caller's tensors.

        Args:
            out: ``[tq, hq, dv]`` contiguous, of q's dtype.
            lse: ``[tq, hq]`` float32 (float64 for float64 inputs), of any strides.
            q, k, v, call: as of :meth:`KernelBackend.forward`.
        """

    def backward_into(
        self,
        target: Tensor | None,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dlse: Tensor | None,
        call: AttentionCall,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """:meth:`KernelBackend.backward` with ``dq`` written to ``target``, contiguous and of q's dtype, if given."""


KeysDone = Callable[..., object]
"""Hears of gradients of keys and values, as :class:`FinishesKeysFirst` says."""


@runtime_checkable
class FinishesKeysFirst(Protocol):
    """The optional ability of a backend to say when gradients of keys and values are there, before those of queries."""

    def backward_keys_first(
        self,
        keys_done: KeysDone,
        target: Tensor | None,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dlse: Tensor | None,
        call: AttentionCall,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """:meth:`WritesInPlace.backward_into` that calls ``keys_done(dk, dv)`` once, as soon as they are launched.

        What ``keys_done`` launches runs behind them on the current stream, before what is left to do for dq.
        Where kernels are compiled and not launched, it is not called.

        A backend that computes gradients of ``call.first_keys`` before some others, and can say on the GPU when these
        are there, calls ``keys_done(dk, dv, rows_there)`` instead: ``rows_there(stream)`` lets a CUDA stream wait until
        they are, which is before the current stream has all of them.
        """


@runtime_checkable
class MergesInPlace(Protocol):
    """The optional ability of a backend to merge its result, as it is written, with the attention to other keys."""

    def forward_onto(
        self, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
    ) -> Tensor | None:
        """:func:`magi_attention.kernels.merge.merge_into` of ``out``, ``lse`` and :meth:`KernelBackend.forward`.

        Args:
            out: ``[tq, hq, dv]`` contiguous, of q's dtype or float32; what is there for queries that the call has no
                keys for stays as it is.
            lse: ``[tq, hq]`` float32, of any strides.
            q, k, v, call: as of :meth:`KernelBackend.forward`.

        Returns:
            max_logits of this call alone, None unless asked for.
        """


@dataclass(frozen=True, eq=False)
class IndexCall:
    """One attention of every query to keys of its own.

    Attributes:
        indices: ``[tq, hk, n]`` int32, contiguous: for each query and key head the rows of k and v that it attends to,
            none of them twice. A list ends at its first negative entry; it may be empty.
        softmax_scale: factor on q·k.
        softcap: if positive, scores become ``softcap * tanh(score / softcap)``.
        max_logits: also return the largest scaled, uncapped score per head.
        sm_margin: multiprocessors of the GPU to leave to others, where a backend can.
        deterministic: the same bits in every run, in the backward pass too.
    """

    indices: Tensor
    softmax_scale: float
    softcap: float = 0.0
    max_logits: bool = False
    sm_margin: int = 0
    deterministic: bool = False


@runtime_checkable
class AttendsToIndices(Protocol):
    """The optional ability of a backend to attend every query to keys that are given by their rows."""

    def supports_indices(self, request: AttentionRequest) -> Support:
        """Say whether it can, as ``supports`` does."""

    def forward_indices(self, q: Tensor, k: Tensor, v: Tensor, call: IndexCall) -> AttentionResult:
        """Attend q ``[tq, hq, d]`` to rows of k ``[tk, hk, d]`` and v ``[tk, hk, dv]``.

        All query heads of a key head share its lists. An index that is not below ``tk`` may stop the program, and must
        not read beyond the keys.
        """


@runtime_checkable
class DifferentiatesByIndices(AttendsToIndices, Protocol):
    """The optional ability of a backend to differentiate that, too."""

    def backward_indices(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dlse: Tensor | None,
        call: IndexCall,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """:meth:`KernelBackend.backward` of :meth:`AttendsToIndices.forward_indices`, whoever has computed that."""


@dataclass(frozen=True)
class KernelSelection:
    """Which kernels to compile ahead of time: every combination of what is listed.

    Attributes:
        arch: the architecture, such as ``"sm_90"``; kernels are compiled for it whatever GPU is here, if any.
        dtypes: data types of the tensors.
        heads: pairs of query heads and key/value heads.
        head_dims: pairs of the head dims of queries and keys, and of values.
        directions: which passes.
        multiprocessors: of the GPUs, where kernels depend on it; None for as many as the GPU here has, or common ones.
    """

    arch: str
    dtypes: tuple[torch.dtype, ...]
    heads: tuple[tuple[int, int], ...]
    head_dims: tuple[tuple[int, int], ...]
    directions: tuple[Direction, ...] = ("forward", "backward")
    multiprocessors: int | None = None


@dataclass(frozen=True)
class PrecompileCase:
    """One kernel to compile: a combination of a :class:`KernelSelection`.

    ``variant`` names what else a backend compiles apart, such as ``"softcap"``; empty for the plain kernel.
    ``multiprocessors`` is the selection's.
    """

    arch: str
    dtype: torch.dtype
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    head_dim_v: int
    direction: Direction
    variant: str = ""
    multiprocessors: int | None = None

    def __str__(self) -> str:
        dims = f"{self.head_dim}" if self.head_dim == self.head_dim_v else f"{self.head_dim}/{self.head_dim_v}"
        parts = [str(self.dtype).removeprefix("torch."), f"{self.num_heads_q}/{self.num_heads_kv} heads", f"dim {dims}"]
        return " ".join([self.arch, *parts, self.direction, self.variant]).rstrip()


@runtime_checkable
class Precompiles(Protocol):
    """The optional ability of a backend to fill its on-disk cache ahead of time; ``magi precompile`` uses it."""

    def precompile_cases(self, selection: KernelSelection) -> Sequence[PrecompileCase]:
        """List the kernels that the backend would launch for ``selection``, leaving out what it does not support.

        Quick, and without a GPU. Several variants of a combination are cases of their own.
        """

    def precompile(self, case: PrecompileCase) -> bool:
        """Compile one case into the cache on disk.

        Called in a fresh process, which compiles for one architecture only, with or without a GPU; several processes
        may share the cache's folder.

        Returns whether it was compiled: False if the cache had it.

        Raises:
            Exception: whatever kept it from being compiled; the message is shown.
        """
