# SPDX-License-Identifier: Apache-2.0
"""What an attention kernel backend must offer. Shape suffixes: t tokens, h heads, d head dim; q queries, k keys."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from magi_attention.common.slices import SliceTable


@dataclass(frozen=True)
class AttentionRequest:
    """What a caller is going to ask of a backend: all that decides whether it can."""

    device: torch.device
    dtype: torch.dtype
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    head_dim_v: int
    softcap: bool = False
    max_logits: bool = False
    deterministic: bool = False

    @classmethod
    def of_tensors(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        dtype: torch.dtype | None = None,
        softcap: float = 0.0,
        max_logits: bool = False,
        deterministic: bool = False,
    ) -> "AttentionRequest":
        """What q ``[tq, hq, d]``, k ``[tk, hk, d]`` and v ``[tk, hk, dv]``, cast to ``dtype``, ask for."""
        return cls(
            device=q.device,
            dtype=dtype or q.dtype,
            num_heads_q=q.shape[1],
            num_heads_kv=k.shape[1],
            head_dim=q.shape[2],
            head_dim_v=v.shape[2],
            softcap=softcap > 0,
            max_logits=max_logits,
            deterministic=deterministic,
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
    """

    slices: SliceTable
    softmax_scale: float
    softcap: float = 0.0
    deterministic: bool = False
    max_logits: bool = False
    sm_margin: int = 0


class AttentionResult(NamedTuple):
    """A stage's output.

    Attributes:
        out: ``[tq, hq, dv]``, 0 for rows without keys; q's dtype, or the precision it was accumulated in.
        lse: ``[tq, hq]`` float32 (float64 for float64 inputs), natural logarithm, -inf for rows without keys.
        max_logits: ``[hq]`` of lse's dtype, -inf without any pair; None unless asked for.
    """

    out: Tensor
    lse: Tensor
    max_logits: Tensor | None = None


@runtime_checkable
class KernelBackend(Protocol):
    """A family of attention kernels. ``BACKEND`` objects of this type stand behind the entry points."""

    name: str
    priority: int  # where several backends support a request, the greatest wins

    def supports(self, request: AttentionRequest) -> Support:
        """Say whether this backend can serve ``request`` on this machine, without compiling or allocating."""

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
