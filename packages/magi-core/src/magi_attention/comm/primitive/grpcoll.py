# SPDX-License-Identifier: Apache-2.0
"""Group cast and group reduce of one tensor, described by lists of splits."""

from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from magi_attention.comm.alltoall import AllToAllCollectives
from magi_attention.comm.group import group_size
from magi_attention.comm.protocol import ReduceOp
from magi_attention.common.logsumexp import accumulation_dtype
from magi_attention.common.slices import expand_counts
from magi_attention.plan.exchange import ExchangeTable


class WorkWithPostProcessFn:
    """A group collective under way, whose result is written when it is waited for.

    Args:
        finish: waits and writes the result to ``output`` and ``lse``; None if it is there already.
        output: the collective's output.
        lse: its log-sum-exps; None without.
    """

    def __init__(self, finish: Callable[[], None] | None, output: Tensor, lse: Tensor | None) -> None:
        self._finish = finish
        self._result: tuple[Tensor, Tensor | None] | None = output, lse

    def wait_post_process(self, output: Tensor, lse: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Wait until the result may be used on the current stream, and return it.

        Args:
            output: the tensor given to the collective, or another one to copy the result to.
            lse: likewise.

        Returns:
            ``output``, or ``(output, lse)`` if both are given.

        Raises:
            RuntimeError: called a second time.
        """
        if self._result is None:
            raise RuntimeError("wait_post_process may be called only once per collective")
        if self._finish is not None:
            self._finish()
        for target, written in zip((output, lse), self._result, strict=True):
            if target is not None and written is not None and target is not written:
                target.copy_(written)
        self._finish, self._result = None, None
        return output if lse is None else (output, lse)


def group_cast(
    input: Tensor,
    output: Tensor,
    input_split_sizes: Sequence[int],
    output_split_sizes: Sequence[int],
    dst_indices: Sequence[Sequence[int]],
    src_index: Sequence[int],
    group: dist.ProcessGroup | None,
    async_op: bool = False,
    cast_lse: bool = False,
    input_lse: Tensor | None = None,
    output_lse: Tensor | None = None,
    **kw: object,
) -> WorkWithPostProcessFn:
    """Send each split of the input to any number of ranks.

    Splits that come from one rank arrive in the order that they have in that rank's input.

    Args:
        input: ``[sum(input_split_sizes), ...]``.
        output: ``[sum(output_split_sizes), ...]``, overwritten.
        input_split_sizes: rows of each split of the input, on the host.
        output_split_sizes: rows of each split of the output, on the host.
        dst_indices: for each split of the input the ranks of the group to send it to.
        src_index: for each split of the output the rank that it comes from.
        group: the process group.
        async_op: return before the output is written: ``wait_post_process`` writes it.
        cast_lse: also cast ``input_lse`` into ``output_lse``, in the same exchange.
        input_lse: ``[sum(input_split_sizes), heads]``.
        output_lse: ``[sum(output_split_sizes), heads]``.
        kw: options of other implementations; ignored.

    Raises:
        ValueError: the lists don't fit each other, the tensors or the group; nothing has been sent then.
    """
    table = exchange_of_splits(input_split_sizes, dst_indices, output_split_sizes, src_index, group_size(group))
    inputs, outputs = _with_lse(input, output, input_lse, output_lse, "cast_lse", cast_lse)
    _check_rows("input", inputs, table.num_source)
    _check_rows("output", outputs, table.num_received)
    _check_same_rows(inputs, outputs)
    work = AllToAllCollectives(group).cast(inputs, table)

    @torch.no_grad()
    def finish() -> None:
        for target, received in zip(outputs, work.wait(), strict=True):
            target.copy_(received)

    return _started(finish, output, output_lse, async_op)


def group_reduce(
    input: Tensor,
    output: Tensor,
    input_split_sizes: Sequence[int],
    output_split_sizes: Sequence[int],
    dst_index: Sequence[int],
    src_indices: Sequence[Sequence[int]],
    group: dist.ProcessGroup | None,
    async_op: bool = False,
    reduce_op: ReduceOp = "sum",
    acc_reduce: bool = True,
    comm_dtype: torch.dtype | None = None,
    input_lse: Tensor | None = None,
    output_lse: Tensor | None = None,
    **kw: object,
) -> WorkWithPostProcessFn:
    """Combine, in each split of the output, the splits that any number of ranks send: a group cast reversed.

    Args:
        input: ``[sum(input_split_sizes), ...]``.
        output: ``[sum(output_split_sizes), ...]``.
        input_split_sizes: rows of each split of the input, on the host.
        output_split_sizes: rows of each split of the output, on the host.
        dst_index: for each split of the input the rank of the group to send it to.
        src_indices: for each split of the output the ranks that send a split to combine there.
        group: the process group.
        async_op: return before the output is complete, which is not to be touched until ``wait_post_process``.
        reduce_op: "sum", "avg" or "lse" (``[rows, heads, dim]`` weighted by the exponential of their lse).
        acc_reduce: combine on top of what the output holds, which counts as one term of "avg"; else overwrite it.
        comm_dtype: dtype in which the input travels; its own by default. Sums are kept in at least float32.
        input_lse: ``[sum(input_split_sizes), heads]``, for "lse" only.
        output_lse: ``[sum(output_split_sizes), heads]``, for "lse" only; corrected too.
        kw: options of other implementations; ignored.

    Raises:
        ValueError: the lists don't fit each other, the tensors or the group; nothing has been sent then.
    """
    names = "src_indices", "dst_index"
    table = exchange_of_splits(output_split_sizes, src_indices, input_split_sizes, dst_index, group_size(group), names)
    inputs, outputs = _with_lse(input, output, input_lse, output_lse, "reduce_op='lse'", reduce_op == "lse")
    _check_rows("input", inputs, table.num_received)
    _check_rows("output", outputs, table.num_source)
    _check_same_rows(inputs, outputs)
    partial = input if comm_dtype is None else input.to(comm_dtype)
    # The mean of the received terms alone is not what "avg" computes, so it is made from their sum.
    mean_of_received = reduce_op == "avg" and not acc_reduce
    total = torch.zeros_like(output, dtype=accumulation_dtype(output)) if mean_of_received else output
    if not acc_reduce:
        output.zero_()
        if output_lse is not None:
            output_lse.fill_(-torch.inf)
    work = AllToAllCollectives(group).reduce(
        [partial],
        table,
        into=[total],
        op="sum" if mean_of_received else reduce_op,
        partial_lse=input_lse,
        into_lse=output_lse,
    )

    @torch.no_grad()
    def finish() -> None:
        work.wait()
        if mean_of_received:
            terms = np.repeat([max(1, len(ranks)) for ranks in src_indices], output_split_sizes)
            shape = (-1, *[1] * (output.dim() - 1))
            output.copy_(total / torch.from_numpy(terms).to(output.device).view(shape))

    return _started(finish, output, output_lse, async_op)


def _started(finish: Callable[[], None], output: Tensor, lse: Tensor | None, async_op: bool) -> WorkWithPostProcessFn:
    if async_op:
        return WorkWithPostProcessFn(finish, output, lse)
    finish()
    return WorkWithPostProcessFn(None, output, lse)


def exchange_of_splits(
    input_split_sizes: Sequence[int],
    dst_indices: Sequence[Sequence[int]],
    output_split_sizes: Sequence[int],
    src_index: Sequence[int],
    num_ranks: int,
    names: tuple[str, str] = ("dst_indices", "src_index"),
) -> ExchangeTable:
    """One rank's exchange, described by splits as in :func:`group_cast`, to be used by a transport any number of times.

    A reduce over the same exchange goes the other way: every split of the output comes back and is combined in the
    split of the input that it was sent from.

    Args:
        input_split_sizes: rows of each split of the input.
        dst_indices: for each split of the input the ranks to send it to.
        output_split_sizes: rows of each split of the output.
        src_index: for each split of the output the rank that it comes from. Splits that come from one rank arrive in
            the order that they have in that rank's input.
        num_ranks: ranks of the group.
        names: what errors call ``dst_indices`` and ``src_index``.

    Raises:
        ValueError: the lists don't fit each other or the group.
    """
    return ExchangeTable(
        send=_ranges_by_rank(names[0], dst_indices, input_split_sizes, num_ranks),
        recv=_ranges_by_rank(names[1], [(rank,) for rank in src_index], output_split_sizes, num_ranks),
        num_ranks=num_ranks,
        num_source=int(sum(input_split_sizes)),
        num_received=int(sum(output_split_sizes)),
    )


def _ranges_by_rank(
    name: str, ranks_of_splits: Sequence[Sequence[int]], split_sizes: Sequence[int], num_ranks: int
) -> NDArray[np.int64]:
    """The rows ``(rank, start, stop)`` of all splits; there may be one for each token, and new ones in each step."""
    if len(ranks_of_splits) != len(split_sizes):
        raise ValueError(f"{name} has {len(ranks_of_splits)} entries for {len(split_sizes)} splits")
    sizes = np.fromiter(split_sizes, np.int64, len(split_sizes))
    if (sizes < 0).any():
        raise ValueError(f"split sizes must not be negative: {list(split_sizes)}")
    split, _ = expand_counts(np.fromiter(map(len, ranks_of_splits), np.int64, len(ranks_of_splits)))
    rank = np.fromiter(chain.from_iterable(ranks_of_splits), np.int64, len(split))
    order = np.lexsort((split, rank))
    split, rank = split[order], rank[order]
    is_wrong = (rank < 0) | (rank >= num_ranks)
    is_wrong[1:] |= (rank[1:] == rank[:-1]) & (split[1:] == split[:-1])
    if is_wrong.any():
        ranks = list(ranks_of_splits[split[is_wrong.argmax()]])
        raise ValueError(f"{name} must hold different ranks of a group of {num_ranks}, not {ranks}")
    stop = np.cumsum(sizes)
    return np.column_stack([rank, (stop - sizes)[split], stop[split]])


def _with_lse(
    input: Tensor, output: Tensor, input_lse: Tensor | None, output_lse: Tensor | None, name: str, wanted: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that travel and those that are written."""
    if input_lse is not None and output_lse is not None and wanted:
        return [input, input_lse], [output, output_lse]
    if wanted:
        raise ValueError(f"{name} needs input_lse and output_lse")
    if input_lse is not None or output_lse is not None:
        raise ValueError(f"input_lse and output_lse are for {name} only")
    return [input], [output]


def _check_rows(name: str, tensors: list[Tensor], num_rows: int) -> None:
    for tensor in tensors:
        if len(tensor) != num_rows:
            raise ValueError(f"the {name} splits hold {num_rows} rows, but a tensor has shape {tuple(tensor.shape)}")


def _check_same_rows(inputs: list[Tensor], outputs: list[Tensor]) -> None:
    for sent, written in zip(inputs, outputs, strict=True):
        if sent.shape[1:] != written.shape[1:] or sent.device != written.device:
            raise ValueError(
                f"rows of {tuple(sent.shape)} on {sent.device} can't go to {tuple(written.shape)} on {written.device}"
            )
