# SPDX-License-Identifier: Apache-2.0
"""Attention kernels for NVIDIA Blackwell GPUs (sm_100a): the backend ``blackwell``, not implemented yet."""

from typing import NoReturn

from magi_attention.kernels.protocol import AttentionRequest, KernelBackend, Support

__all__ = ["BACKEND", "BlackwellBackend"]

REASON = "the Blackwell kernels (sm_100a) are not implemented yet: use backend 'flex', which runs on Blackwell GPUs"


class BlackwellBackend:
    """The place that the sm_100a kernels will take: it supports nothing and says so."""

    name = "blackwell"

    def supports(self, request: AttentionRequest) -> Support:
        """Answer no to every request, with the reason and the backend to use instead."""
        return Support(False, REASON)

    def expected_tflops(self, request: AttentionRequest) -> float:
        """Nothing."""
        return 0.0

    def forward(self, *args: object, **kwargs: object) -> NoReturn:
        """Raise the ``RuntimeError`` that the answer of ``supports`` announces."""
        raise RuntimeError(REASON)

    backward = forward


BACKEND: KernelBackend = BlackwellBackend()
