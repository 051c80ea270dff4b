# SPDX-License-Identifier: Apache-2.0
"""Attention kernels for NVIDIA Hopper GPUs (sm_90a): the backend ``hopper``, not implemented yet."""

from typing import NoReturn

from magi_attention.kernels.protocol import AttentionRequest, KernelBackend, Support

__all__ = ["BACKEND", "HopperBackend"]

REASON = "the Hopper kernels (sm_90a) are not implemented yet: use backend 'flex', which runs on Hopper GPUs"


class HopperBackend:
    """The place that the sm_90a kernels will take: it supports nothing and says so."""

    name = "hopper"

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


BACKEND: KernelBackend = HopperBackend()
