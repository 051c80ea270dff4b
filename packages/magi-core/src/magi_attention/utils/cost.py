# SPDX-License-Identifier: Apache-2.0
"""Cost factors for :class:`magi_attention.config.OverlapConfig`, in a common unit (microseconds by default)."""


def get_calc_cost_factor(
    num_heads_q: int, head_dim: int, tflops: float, mfu: float, sec_ratio: float = 1e6, is_fwd: bool = True
) -> float:
    """The time to compute one (query, key) pair of all heads.

    Args:
        num_heads_q: query heads.
        head_dim: numbers per head.
        tflops: the device's peak rate, in floating-point operations per second.
        mfu: the share of it that the kernel reaches.
        sec_ratio: units of time per second.
        is_fwd: the forward pass, which takes ``4 * num_heads_q * head_dim`` operations; backward takes 2.5 times that.
    """
    return 4 * num_heads_q * head_dim / tflops / mfu * sec_ratio * (1.0 if is_fwd else 2.5)


def get_comm_cost_factor(
    num_heads_kv: int, head_dim: int, bandwidth: float, bwu: float, corr_factor: float, sec_ratio: float = 1e6
) -> float:
    """The time to exchange one row of keys and values.

    Args:
        num_heads_kv: key-value heads.
        head_dim: numbers per head.
        bandwidth: the link's peak rate, in numbers per second.
        bwu: the share of it that the exchange reaches.
        corr_factor: the share of the rows that travel; see :func:`get_a2a_corr_factor`.
        sec_ratio: units of time per second.
    """
    return 2 * num_heads_kv * head_dim / bandwidth / corr_factor / bwu * sec_ratio


def get_a2a_corr_factor(world_size: int) -> float:
    """The share of an all-to-all's rows that leave their rank: ``(n - 1) / n``; 1 for a single rank."""
    return (world_size - 1) / world_size if world_size > 1 else 1.0
