# SPDX-License-Identifier: Apache-2.0
"""The layout of a dispatched sequence as older code reads it."""

from magi_attention.runtime.dispatch_meta import DispatchMeta, make_dispatch_meta_from_qk_ranges

__all__ = ["DispatchMeta", "make_dispatch_meta_from_qk_ranges"]
