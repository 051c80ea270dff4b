# SPDX-License-Identifier: Apache-2.0
"""Attention on one device by the backend "fa4", whatever backend is configured."""

from torch import Tensor

from magi_attention.functional.single_device import attend_on_one_device, check_tensors, make_job, slices_from_tensors


def ffa_fa4_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_ranges: Tensor,
    k_ranges: Tensor,
    attn_type_map: Tensor | None = None,
    *,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    deterministic: bool = False,
    reuse_attn_arg: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attend q to k and v over slices by the backend "fa4", for benchmarks.

    Arguments are those of :func:`magi_attention.functional.flex_flash_attn_func`. ``reuse_attn_arg`` is accepted and
    has no effect: tables of recent masks are always reused.

    Returns:
        out ``[tq, hq, dv]`` and lse ``[tq, hq]``.

    Raises:
        ValueError: If tensors or ranges cannot be right.
        TypeError: If an argument is not a tensor of the right kind.
        RuntimeError: If the backend is not installed, or cannot serve the call.
    """
    check_tensors(q, k, v)
    slices = slices_from_tensors(q_ranges, k_ranges, attn_type_map, q.shape[0], k.shape[0])
    job = make_job(
        q,
        k,
        v,
        slices,
        softmax_scale=softmax_scale,
        softcap=softcap,
        deterministic=deterministic,
        backends=("fa4", "same"),
    )
    out, meta = attend_on_one_device(q, k, v, None, job)
    assert meta.lse is not None
    return out, meta.lse
