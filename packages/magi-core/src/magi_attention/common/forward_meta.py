# SPDX-License-Identifier: Apache-2.0
"""What an attention returns besides its output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class AttnForwardMeta:
    """By-products of an attention's forward pass.

    Attributes:
        lse: ``[tokens, heads]`` float32 (float64 for float64 inputs): the natural logarithm of the softmax's
            denominator over all keys of the row, a sink included; -inf for a row without any.
        max_logits: ``[heads]``, lse's dtype: the largest scaled score of any kept pair; None unless asked for.
    """

    lse: Tensor | None
    max_logits: Tensor | None
