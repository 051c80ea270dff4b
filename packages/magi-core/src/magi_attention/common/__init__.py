# SPDX-License-Identifier: Apache-2.0
"""Values that everything else is made of: ranges, rectangles, masks, enumerations. None needs torch to be imported."""

from magi_attention.common import enum, jit, range_op
from magi_attention.common.enum import AttnMaskType
from magi_attention.common.forward_meta import AttnForwardMeta
from magi_attention.common.mask import AttnMask
from magi_attention.common.range import AttnRange, RangeError
from magi_attention.common.ranges import AttnRanges
from magi_attention.common.rectangle import AttnRectangle
from magi_attention.common.rectangles import AttnRectangles

USE_CPP_BACKEND = False


def is_cpp_backend_enable() -> bool:
    """Whether the range classes are in C++, which they never are."""
    return USE_CPP_BACKEND


__all__ = [
    "USE_CPP_BACKEND",
    "AttnForwardMeta",
    "AttnMask",
    "AttnMaskType",
    "AttnRange",
    "AttnRanges",
    "AttnRectangle",
    "AttnRectangles",
    "RangeError",
    "enum",
    "is_cpp_backend_enable",
    "jit",
    "range_op",
]
