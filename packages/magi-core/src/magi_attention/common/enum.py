# SPDX-License-Identifier: Apache-2.0
"""The public enumerations."""

from enum import Enum
from typing import Literal

GroupReduceOp = Literal["sum", "avg", "lse"]
AttnSinkLayout = Literal["sh", "shd", "ssh"]


class AttnMaskType(Enum):
    """The shape that a slice keeps of its rectangle of queries ``[q0, q1)`` and keys ``[k0, k1)``.

    ``FULL`` keeps everything; ``CAUSAL`` keys ``j <= i + (k1 - q1)``; ``INVCAUSAL`` keys ``j >= i + (k0 - q0)``;
    ``BICAUSAL`` what both keep.
    """

    FULL = "full"
    CAUSAL = "causal"
    INVCAUSAL = "inv_causal"
    BICAUSAL = "bi_causal"

    def to_int_type(self) -> int:
        """The type's integer in slice tables: 0 to 3 in the order above."""
        return list(AttnMaskType).index(self)

    @classmethod
    def from_int_type(cls, int_type: int) -> "AttnMaskType":
        """The inverse of :meth:`to_int_type`; ``KeyError`` for other numbers."""
        members = list(cls)
        if int_type not in range(len(members)):
            raise KeyError(f"{int_type!r} is not an attention mask type; known are 0 to {len(members) - 1}")
        return members[int_type]
