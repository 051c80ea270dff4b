# SPDX-License-Identifier: Apache-2.0
"""All-gather, scatter and all-to-all whose ranks hold parts of different lengths. Not differentiable."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from magi_attention.comm.alltoall import AllToAllCollectives
from magi_attention.comm.group import group_rank, group_size
from magi_attention.plan.exchange import ExchangeTable


@torch.no_grad()
def all_gather_v(
    x: Tensor, group: dist.ProcessGroup | None, dim: int = 0, split_sizes: Sequence[int] | None = None
) -> Tensor:
    """Concatenate the ranks' tensors along ``dim``, in the order of the ranks.

    Args:
        x: this rank's part; the parts may differ in length along ``dim`` alone.
        group: the process group.
        dim: the dimension to concatenate along.
        split_sizes: length of each rank's part; None to ask the ranks, which makes the host wait.

    Returns:
        The whole tensor, contiguous, the same on every rank.

    Raises:
        ValueError: ``split_sizes`` has not one size per rank, or another one for this rank than ``x`` has.
    """
    num_ranks = group_size(group)
    if split_sizes is not None:
        _check_sizes("split_sizes", split_sizes, num_ranks)
        if (expected := split_sizes[group_rank(group)]) != x.shape[dim]:
            raise ValueError(f"x has length {x.shape[dim]} along dim {dim}, but its split size is {expected}")
    if num_ranks == 1:
        return x.contiguous()
    if split_sizes is None:
        lengths = torch.empty(num_ranks, dtype=torch.int64, device=x.device)
        dist.all_gather(list(lengths.view(-1, 1)), torch.tensor([x.shape[dim]], device=x.device), group)
        split_sizes = lengths.tolist()
    # Bytes, since not every backend knows every dtype; padded to the longest part, since parts must be equally long.
    rows = x.movedim(dim, 0).contiguous()
    row_bytes = rows.shape[1:].numel() * x.itemsize
    longest = max(split_sizes)
    part = x.new_zeros(longest * row_bytes, dtype=torch.uint8)
    part[: rows.numel() * x.itemsize] = rows.view(-1).view(torch.uint8)
    parts = x.new_empty((num_ranks, longest * row_bytes), dtype=torch.uint8)
    dist.all_gather(list(parts), part, group)
    used = [gathered[: size * row_bytes] for gathered, size in zip(parts, split_sizes, strict=True)]
    whole = torch.cat(used).view(x.dtype).view(sum(split_sizes), *rows.shape[1:])
    return whole.movedim(0, dim).contiguous()


def scatter_v(
    x: Tensor, group: dist.ProcessGroup | None, dim: int = 0, split_sizes: Sequence[int] | None = None
) -> Tensor:
    """Return this rank's part of a tensor that every rank holds whole: the inverse of :func:`all_gather_v`.

    Args:
        x: the whole tensor, the same on every rank; nothing is sent.
        group: the process group.
        dim: the dimension to split.
        split_sizes: length of each rank's part; None for equal parts.

    Returns:
        This rank's part, contiguous.

    Raises:
        ValueError: the sizes don't add up to the length of ``x``, or it can't be split equally.
    """
    num_ranks, length = group_size(group), x.shape[dim]
    if split_sizes is None:
        if length % num_ranks:
            raise ValueError(f"{length} rows along dim {dim} can't be split equally over {num_ranks} ranks")
        split_sizes = [length // num_ranks] * num_ranks
    _check_sizes("split_sizes", split_sizes, num_ranks, length)
    return x.split(list(split_sizes), dim)[group_rank(group)].contiguous()


@torch.no_grad()
def all2all_v(
    x: Tensor,
    group: dist.ProcessGroup | None,
    input_split_sizes: Sequence[int],
    output_split_sizes: Sequence[int],
    dim: int = 0,
) -> Tensor:
    """Send the r-th part of ``x`` along ``dim`` to rank r, and concatenate what the ranks send to this one.

    Args:
        x: the parts to send, one after another.
        group: the process group.
        input_split_sizes: lengths of the parts to send, one per rank.
        output_split_sizes: lengths of the parts to receive, one per rank.
        dim: the dimension that is split.

    Returns:
        The received parts in the order of the ranks, contiguous.

    Raises:
        ValueError: the sizes don't fit ``x`` or the group.
    """
    num_ranks = group_size(group)
    _check_sizes("input_split_sizes", input_split_sizes, num_ranks, x.shape[dim])
    _check_sizes("output_split_sizes", output_split_sizes, num_ranks)
    table = ExchangeTable(
        send=_ranges_of_peers(input_split_sizes),
        recv=_ranges_of_peers(output_split_sizes),
        num_ranks=num_ranks,
        num_source=sum(input_split_sizes),
        num_received=sum(output_split_sizes),
    )
    (received,) = AllToAllCollectives(group).cast([x.movedim(dim, 0)], table).wait()
    return received.movedim(0, dim).contiguous()


def _ranges_of_peers(sizes: Sequence[int]) -> NDArray[np.int64]:
    stop = np.cumsum(sizes)
    return np.column_stack([np.arange(len(sizes)), stop - sizes, stop])


def _check_sizes(name: str, sizes: Sequence[int], num_ranks: int, total: int | None = None) -> None:
    if len(sizes) != num_ranks or min(sizes) < 0:
        raise ValueError(f"{name} must hold one size per rank of the group of {num_ranks}, not {list(sizes)}")
    if total is not None and sum(sizes) != total:
        raise ValueError(f"{name} {list(sizes)} must add up to {total}, not {sum(sizes)}")
