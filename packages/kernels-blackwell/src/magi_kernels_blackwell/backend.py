# SPDX-License-Identifier: Apache-2.0
"""What the backends of this package have in common.

Shape suffixes: t tokens, h heads, d head dim; q queries, k keys.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from magi_attention.kernels.protocol import (
    AttentionCall,
    AttentionRequest,
    AttentionResult,
    KernelSelection,
    KeysDone,
    PrecompileCase,
    Support,
    attend_to_nothing,
)
from magi_attention.utils.dtypes import as_dtype
from magi_attention.utils.torch_modes import on_device_of, without_grad
from magi_kernels_blackwell.cache import why_switched_off, why_unkept
from magi_kernels_blackwell.cases import arch_number, combinations, request_of
from magi_kernels_blackwell.masks import has_pairs
from magi_kernels_blackwell.measured import tflops
from magi_kernels_blackwell.prepared import ignore
from magi_kernels_blackwell.support import DTYPES, gpu_support
from magi_kernels_blackwell.wheels import capability_of, missing_wheels

LATENT_DIMS = (192, 128)
"""Head dims of multi-head latent attention: those of queries and keys, and of values."""


class WheelBackend(ABC):
    """A backend on published wheels; see :class:`magi_attention.kernels.protocol.KernelBackend`.

    Results have the inputs' dtype.

    Attributes:
        name: of the backend.
        wheels: the projects that it needs, with their exact versions.
        variable_prefix: what the environment variables of the project with its kernels begin with.
        measured_as: its name in :mod:`magi_kernels_blackwell.measured`.
        variants: of kernels to compile ahead of time, as :mod:`magi_kernels_blackwell.cases` names them.
    """

    name: str
    wheels: ClassVar[dict[str, str]]
    variable_prefix: ClassVar[str]
    measured_as: ClassVar[str]
    variants: ClassVar[Sequence[str]]

    @abstractmethod
    def supports_on(self, arch: int, request: AttentionRequest) -> Support:
        """Whether the kernels of an architecture, ``10 * major + minor``, can serve a request; wherever this runs."""

    @abstractmethod
    def compile_case(self, case: PrecompileCase) -> bool:
        """Compile a case, its wheels being here; returns False if the cache had all of it."""

    @abstractmethod
    def launch_forward(
        self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, into: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return out ``[tq, hq, dv]``, lse ``[hq, tq]`` and max_logits ``[hq]`` if asked for; there are some pairs.

        ``out`` is written ``into`` the tensor, if one is given.
        """

    @abstractmethod
    def launch_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dlse: Tensor | None,
        call: AttentionCall,
        into: Tensor | None = None,
        keys_done: KeysDone = ignore,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk and dv. dout and out have q's dtype; lse and dlse are ``[hq, tq]``; there are some pairs.

        ``dq`` is written ``into`` the tensor, if one is given and the kernels can. ``keys_done`` is that of
        :class:`magi_attention.kernels.protocol.FinishesKeysFirst`.
        """

    def supports(self, request: AttentionRequest) -> Support:
        """See the protocol."""
        if (refusal := gpu_support(request, self.wheels)) is not None:
            return refusal
        return self.supports_on(capability_of(request.device), request)

    def expected_tflops(self, request: AttentionRequest) -> float:
        """See the protocol."""
        return tflops(self.measured_as, request)

    def precompile_cases(self, selection: KernelSelection) -> Sequence[PrecompileCase]:
        """See :class:`magi_attention.kernels.protocol.Precompiles`."""
        arch = arch_number(selection.arch)
        return [
            case
            for case in combinations(selection, self.variants)
            if case.dtype in DTYPES
            and self.supports_on(arch, request_of(case))
            and not ("deterministic" in case.variant and case.direction == "forward")
        ]

    def precompile(self, case: PrecompileCase) -> bool:
        """See :class:`magi_attention.kernels.protocol.Precompiles`.

        Raises:
            RuntimeError: If a wheel is missing, or kernels cannot be kept on disk.
        """
        if reason := missing_wheels(tuple(self.wheels.items())) or why_switched_off(self.variable_prefix):
            raise RuntimeError(reason)
        compiled = self.compile_case(case)
        if compiled and (unkept := why_unkept()):
            raise RuntimeError(unkept)
        return compiled

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> AttentionResult:
        """See the protocol."""
        return self._forward(None, q, k, v, call)

    def forward_into(
        self, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
    ) -> AttentionResult:
        """See :class:`magi_attention.kernels.protocol.WritesInPlace`; lse is always a tensor of its own."""
        return self._forward(out, q, k, v, call)

    @without_grad
    def _forward(self, target: Tensor | None, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> AttentionResult:
        if not has_pairs(call.slices):
            return attend_to_nothing(q, v, call.max_logits)
        q, call = _with_positive_scale(q, call)
        with on_device_of(q):
            out, lse, max_logits = self.launch_forward(q, k, v, call, target)
        return AttentionResult(out, lse.T, max_logits)

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
        """See the protocol."""
        return self.backward_into(None, dout, q, k, v, out, lse, dlse, call)

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
        """See :class:`magi_attention.kernels.protocol.WritesInPlace`."""
        return self.backward_keys_first(ignore, target, dout, q, k, v, out, lse, dlse, call)

    @without_grad
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
        """See :class:`magi_attention.kernels.protocol.FinishesKeysFirst`."""
        if not has_pairs(call.slices):
            dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
            keys_done(dk, dv)
            return dq, dk, dv
        lse = as_dtype(lse.T, torch.float32).contiguous()
        dlse = None if dlse is None else as_dtype(dlse.T, torch.float32).contiguous()
        dout, out, scale = as_dtype(dout, q.dtype), as_dtype(out, q.dtype), call.softmax_scale
        q, call = _with_positive_scale(q, call)
        with on_device_of(q):
            dq, dk, dv = self.launch_backward(dout, q, k, v, out, lse, dlse, call, target, keys_done)
        if scale <= 0:
            dq = dq.neg_() if scale < 0 else dq.zero_()
        return dq, dk, dv


def _with_positive_scale(q: Tensor, call: AttentionCall) -> tuple[Tensor, AttentionCall]:
    """Return queries and a call with the same scores: kernels mask with -inf, and take maxima, before they scale."""
    scale = call.softmax_scale
    if scale > 0:
        return q, call
    return -q if scale < 0 else torch.zeros_like(q), replace(call, softmax_scale=abs(scale) or 1.0)
