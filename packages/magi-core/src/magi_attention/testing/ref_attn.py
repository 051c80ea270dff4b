# SPDX-License-Identifier: Apache-2.0
"""The reference attention in the signature that the original's users know."""

from typing import Literal

from torch import Tensor

from magi_attention.common.forward_meta import AttnForwardMeta
from magi_attention.testing.oracle import masked_attention


def ref_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    sink: Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    layout: Literal["thd"] = "thd",
    sink_layout: Literal["sh", "ssh"] = "sh",
    backend: Literal["sdpa", "torch"] = "sdpa",
    high_precision: bool = False,
    return_lse: bool = False,
    return_max_logits: bool = False,
    online_softmax: bool = False,
) -> tuple[Tensor, AttnForwardMeta]:
    """Attend under a dense bool ``mask`` ``[tq, tk]``, in float64 if ``high_precision``, else in the inputs' dtype.

    ``backend`` and ``online_softmax`` name ways to the same result and are accepted for compatibility.

    Returns:
        out in q's dtype (float64 if ``high_precision``) and the meta with what was asked for.
    """
    if layout != "thd" or sink_layout not in ("sh", "ssh"):
        raise ValueError(f"layout must be 'thd' and sink_layout 'sh' or 'ssh', got {layout!r} and {sink_layout!r}")
    if high_precision:
        q, k, v = q.double(), k.double(), v.double()
    out, lse, max_logits = masked_attention(q, k, v, mask, softmax_scale=softmax_scale, softcap=softcap, sink=sink)
    return out, AttnForwardMeta(lse=lse if return_lse else None, max_logits=max_logits if return_max_logits else None)
