# SPDX-License-Identifier: Apache-2.0
"""Attention kernels: what a backend must offer, how one is chosen, and the backends that need nothing but torch."""
