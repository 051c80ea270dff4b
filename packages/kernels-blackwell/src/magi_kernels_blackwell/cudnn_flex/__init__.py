# SPDX-License-Identifier: Apache-2.0
"""The backend ``cudnn_flex``: the block-sparse attention kernels of NVIDIA's cuDNN frontend."""
