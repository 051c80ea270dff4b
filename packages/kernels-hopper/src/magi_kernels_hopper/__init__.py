# SPDX-License-Identifier: Apache-2.0
"""Attention kernels for NVIDIA Hopper GPUs (sm_90a): the backend ``hopper``.

Importing this package needs no GPU.
"""

from magi_kernels_hopper.backend import BACKEND, HopperBackend

__all__ = ["BACKEND", "HopperBackend"]
