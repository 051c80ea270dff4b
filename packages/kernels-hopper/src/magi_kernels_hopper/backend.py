# SPDX-License-Identifier: Apache-2.0
"""The backend ``hopper``: attention kernels for NVIDIA Hopper GPUs, launched from the cubins of this wheel.

Shape suffixes: t tokens, h heads, d head dim; q queries, k keys.
"""

import torch
from torch import Tensor

from magi_attention.kernels.merge import merge_into
from magi_attention.kernels.protocol import (
    AttentionCall,
    AttentionRequest,
    AttentionResult,
    Direction,
    IndexCall,
    KernelBackend,
    KeysDone,
    Support,
    attend_to_nothing,
)
from magi_attention.utils.torch_modes import on_device_of, without_grad
from magi_kernels_hopper.measured import tflops
from magi_kernels_hopper.support import support_of, support_of_indices


class HopperBackend:
    """See :class:`magi_attention.kernels.protocol.KernelBackend`. Results have q's dtype."""

    name = "hopper"

    def __init__(self) -> None:
        self._served: set[object] = set()

    def supports(self, request: AttentionRequest) -> Support:
        """See the protocol."""
        return support_of(request)

    def expected_tflops(self, request: AttentionRequest) -> float:
        """See the protocol."""
        return tflops(request)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> AttentionResult:
        """See the protocol.

        Raises:
            RuntimeError: with the reason why not, if the tensors are not what :meth:`supports` would say yes to.
        """
        out, lse = q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[:2], dtype=torch.float32)
        return self.forward_into(out, lse, q, k, v, call)  # which records no gradients

    @without_grad
    def forward_into(
        self, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
    ) -> AttentionResult:
        """See :class:`magi_attention.kernels.protocol.WritesInPlace`."""
        self._check("forward", q, k, v, call)
        if not q.shape[0] or not k.shape[0]:
            return attend_to_nothing(q, v, call.max_logits)
        return AttentionResult(out, lse, _launch(q, k, v, call, out, lse, merge=False))

    @without_grad
    def forward_onto(
        self, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
    ) -> Tensor | None:
        """See :class:`magi_attention.kernels.protocol.MergesInPlace`."""
        self._check("forward", q, k, v, call)
        if not q.shape[0] or not k.shape[0]:
            return attend_to_nothing(q, v, call.max_logits).max_logits
        if out.is_contiguous() and out.dtype in (q.dtype, torch.float32):
            return _launch(q, k, v, call, out, lse, merge=True)
        result = self.forward(q, k, v, call)
        merge_into(out, lse, result.out, result.lse)
        return result.max_logits

    def supports_indices(self, request: AttentionRequest) -> Support:
        """See :class:`magi_attention.kernels.protocol.AttendsToIndices`."""
        return support_of_indices(request)

    @without_grad
    def forward_indices(self, q: Tensor, k: Tensor, v: Tensor, call: IndexCall) -> AttentionResult:
        """See :class:`magi_attention.kernels.protocol.AttendsToIndices`; the tensors are not empty.

        Raises:
            RuntimeError: with the reason why not, if :meth:`supports_indices` would say no to the tensors.
        """
        self._check_indices("forward", q, k, v, call)
        from magi_kernels_hopper.index import launch_index

        out = q.new_empty(*q.shape[:2], v.shape[2])
        lse = q.new_empty(q.shape[:2], dtype=torch.float32)
        max_logits = lse.new_full(lse.shape[1:], -torch.inf) if call.max_logits else None
        with on_device_of(q):
            launch_index(q, k, v, call, out, lse, max_logits)
        return AttentionResult(out, lse, max_logits)

    @without_grad
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
        """See :class:`magi_attention.kernels.protocol.DifferentiatesByIndices`; the tensors are not empty.

        Raises:
            RuntimeError: as :meth:`forward_indices`.
        """
        self._check_indices("backward", q, k, v, call)
        from magi_kernels_hopper.index_backward import launch_index_backward

        with on_device_of(q):
            return launch_index_backward(dout, q, k, v, out, lse, dlse, call)

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
        """See the protocol.

        Raises:
            RuntimeError: with the reason why not, if the tensors are not what :meth:`supports` would say yes to.
        """
        return self.backward_keys_first(None, None, dout, q, k, v, out, lse, dlse, call)

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
        """See :class:`magi_attention.kernels.protocol.WritesInPlace`; dq is always a tensor of its own."""
        return self.backward(dout, q, k, v, out, lse, dlse, call)

    @without_grad
    def backward_keys_first(
        self,
        keys_done: KeysDone | None,
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
        """See :class:`magi_attention.kernels.protocol.FinishesKeysFirst`; dq is always a tensor of its own.

        Nobody waits for gradients of keys where ``keys_done`` is None.
        """
        self._check("backward", q, k, v, call)
        if not len(q) or not len(k):
            gradients = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
            if keys_done is not None:
                keys_done(*gradients[1:])
            return gradients
        from magi_kernels_hopper.backward import launch_backward

        with on_device_of(q):
            return launch_backward(dout, q, k, v, out, lse, dlse, call, keys_done)

    def _check_indices(self, direction: Direction, q: Tensor, k: Tensor, v: Tensor, call: IndexCall) -> None:
        request = AttentionRequest.of_tensors(q, k, v, softcap=call.softcap, max_logits=call.max_logits)
        if not (support := support_of_indices(request.toward(direction))):
            raise RuntimeError(f"backend {self.name!r}: {support.reason}")

    def _check(self, direction: Direction, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> None:
        """Raise ``RuntimeError`` for what is not supported; once found to be, that is not asked again."""
        options = call.softcap > 0, call.max_logits, call.deterministic
        asked = direction, q.device, q.dtype, q.shape[1:], k.shape[1:], v.shape[1:], options
        if asked in self._served:
            return
        request = AttentionRequest.of_tensors(
            q, k, v, softcap=call.softcap, max_logits=call.max_logits, deterministic=call.deterministic
        )
        if not (support := support_of(request.toward(direction))):
            raise RuntimeError(f"backend {self.name!r}: {support.reason}")
        self._served.add(asked)


def _launch(
    q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, out: Tensor, lse: Tensor, *, merge: bool
) -> Tensor | None:
    from magi_kernels_hopper.forward import launch_forward

    with on_device_of(q):
        return launch_forward(q, k, v, call, out, lse, merge=merge)


BACKEND: KernelBackend = HopperBackend()
