# SPDX-License-Identifier: Apache-2.0
"""The backend ``blackwell``: FlashAttention-4's kernels, with masks read from tables of intervals."""
