# SPDX-License-Identifier: Apache-2.0
"""Attention kernels on published wheels, for NVIDIA Blackwell and Hopper GPUs: backends ``blackwell``, ``cudnn_flex``.

Importing this package imports neither wheel and needs no GPU.
"""

from magi_kernels_blackwell.cudnn_flex.backend import BACKEND as CUDNN_FLEX_BACKEND
from magi_kernels_blackwell.fa4.backend import BACKEND as FLASH_ATTENTION_4_BACKEND

__all__ = ["CUDNN_FLEX_BACKEND", "FLASH_ATTENTION_4_BACKEND"]
