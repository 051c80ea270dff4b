# SPDX-License-Identifier: Apache-2.0
"""The collectives that are described by lists of splits."""

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.distributed as dist

from magi_attention.comm.primitive import (
    all2all_v,
    all_gather_v,
    exchange_of_splits,
    group_cast,
    group_reduce,
    scatter_v,
)
from magi_attention.testing.distributed import RankPool
from tests.distributed.exchanges import random_tensor

# Four splits per rank, of 1 to 4 rows; split i of rank r goes to the ranks listed here. Two ranks are enough.
SIZES = [[1, 3, 2, 4], [2, 0, 3, 1]]
DESTINATIONS = [[[0, 1], [1], [], [0]], [[0], [1, 0], [0, 1], [1]]]
# The splits that each rank receives, as (source, its split), in an order of the receiver's own choice, in which those
# of one source stay in their order.
RECEIVED = [[(1, 0), (0, 0), (0, 3), (1, 1), (1, 2)], [(0, 0), (1, 1), (0, 1), (1, 2), (1, 3)]]


@pytest.fixture(scope="module", params=["gloo", pytest.param("nccl", marks=pytest.mark.gpu(2))])
def pool(request):
    with RankPool(2, request.param) as pool:
        yield pool


def device_of_backend() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend() else torch.device("cpu")


def split_lists(rank: int) -> dict[str, list]:
    """The arguments of a cast; those of a reduce are the same with input and output swapped."""
    return {
        "input_split_sizes": SIZES[rank],
        "output_split_sizes": [SIZES[source][i] for source, i in RECEIVED[rank]],
        "dst_indices": DESTINATIONS[rank],
        "src_index": [source for source, _ in RECEIVED[rank]],
    }


def rows_of(rank: int, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return random_tensor(rank + seed, (sum(SIZES[rank]), *shape), dtype)


def cast(rank: int, world_size: int, async_op: bool, with_lse: bool) -> None:
    device = device_of_backend()
    lists = split_lists(rank)
    num_received = sum(lists["output_split_sizes"])
    output = torch.full((num_received, 3, 2), torch.nan, device=device)
    lse = torch.full((num_received, 3), torch.nan, device=device) if with_lse else None
    options = (
        {"cast_lse": True, "input_lse": rows_of(rank, 3, seed=9).to(device), "output_lse": lse} if with_lse else {}
    )
    work = group_cast(
        rows_of(rank, 3, 2).to(device), output, **lists, group=dist.group.WORLD, async_op=async_op, **options
    )
    result = work.wait_post_process(output, lse) if with_lse else (work.wait_post_process(output),)
    for actual, given, sources in zip(
        result,
        (output, lse),
        ([rows_of(r, 3, 2) for r in range(2)], [rows_of(r, 3, seed=9) for r in range(2)]),
        strict=False,
    ):
        assert actual is given
        expected = torch.cat([sources[source].split(SIZES[source])[i] for source, i in RECEIVED[rank]])
        assert torch.equal(actual.cpu(), expected)
    with pytest.raises(RuntimeError, match="only once"):
        work.wait_post_process(output)


@pytest.mark.parametrize("async_op", [False, True])
@pytest.mark.parametrize("with_lse", [False, True])
def test_group_cast(pool, async_op, with_lse):
    pool.run(cast, async_op, with_lse)


def reduce(rank: int, world_size: int, op: str, accumulate: bool, comm_dtype: torch.dtype | None) -> None:
    device = device_of_backend()
    lists = split_lists(rank)
    partials = [random_tensor(50 + r, (sum(split_lists(r)["output_split_sizes"]), 3, 2), torch.float32) for r in (0, 1)]
    lses = [random_tensor(60 + r, (len(partials[r]), 3), torch.float32) for r in (0, 1)]
    old, old_lse = rows_of(rank, 3, 2, seed=70), rows_of(rank, 3, seed=80)
    output, lse = old.to(device, copy=True), old_lse.to(device, copy=True)
    options = {"input_lse": lses[rank].to(device), "output_lse": lse} if op == "lse" else {}
    work = group_reduce(
        partials[rank].to(device),
        output,
        input_split_sizes=lists["output_split_sizes"],
        output_split_sizes=lists["input_split_sizes"],
        dst_index=lists["src_index"],
        src_indices=lists["dst_indices"],
        group=dist.group.WORLD,
        async_op=True,
        reduce_op=op,
        acc_reduce=accumulate,
        comm_dtype=comm_dtype,
        **options,
    )
    elsewhere = torch.empty_like(output)
    if op == "lse":
        work.wait_post_process(elsewhere, lse)
    else:
        work.wait_post_process(elsewhere)
    assert torch.equal(elsewhere, output)

    expected, expected_lse = [], []
    for split, (size, values, weights) in enumerate(
        zip(SIZES[rank], old.split(SIZES[rank]), old_lse.split(SIZES[rank]), strict=True)
    ):
        terms, term_lses = ([values], [weights]) if accumulate else ([], [])
        for r in DESTINATIONS[rank][split]:
            at = RECEIVED[r].index((rank, split))
            sizes = split_lists(r)["output_split_sizes"]
            terms.append(partials[r].split(sizes)[at].to(comm_dtype or torch.float32).float())
            term_lses.append(lses[r].split(sizes)[at])
        if not terms:
            terms, term_lses = [torch.zeros(size, 3, 2)], [torch.full((size, 3), -torch.inf)]
        weights = torch.stack(term_lses)
        expected_lse.append(weights.logsumexp(0))
        values = torch.stack(terms)
        if op == "lse":
            values = values * weights.softmax(0).nan_to_num()[..., None]
        expected.append(values.mean(0) if op == "avg" else values.sum(0))
    torch.testing.assert_close(output.cpu(), torch.cat(expected))
    if op == "lse":
        torch.testing.assert_close(lse.cpu(), torch.cat(expected_lse))


@pytest.mark.parametrize("op", ["sum", "avg", "lse"])
@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("comm_dtype", [None, torch.bfloat16, torch.float8_e4m3fn])
def test_group_reduce(pool, op, accumulate, comm_dtype):
    pool.run(reduce, op, accumulate, comm_dtype)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_split_sizes": [3]}, "dst_indices has 2 entries for 1 splits"),
        ({"output_split_sizes": [3, 0]}, "src_index has 1 entries for 2 splits"),
        ({"input_split_sizes": [4, -1]}, "must not be negative"),
        ({"dst_indices": [[0, 0], []]}, "dst_indices must hold different ranks of a group of 1"),
        ({"dst_indices": [[1], []]}, "dst_indices must hold different ranks of a group of 1"),
        ({"src_index": [-1]}, "src_index must hold different ranks of a group of 1"),
        ({"input_split_sizes": [1, 1]}, "the input splits hold 2 rows, but a tensor has shape"),
        ({"output_split_sizes": [2]}, "the output splits hold 2 rows, but a tensor has shape"),
        ({"output": torch.zeros(1, 5)}, "can't go to"),
        ({"cast_lse": True}, "cast_lse needs input_lse and output_lse"),
        ({"input_lse": torch.zeros(3)}, "are for cast_lse only"),
    ],
)
def test_lists_that_do_not_fit_are_refused(changes, message):
    fitting = {
        "input": torch.zeros(3, 4),
        "output": torch.zeros(1, 4),
        "input_split_sizes": [1, 2],
        "output_split_sizes": [1],
        "dst_indices": [[0], []],
        "src_index": [0],
        "group": None,
    }
    group_cast(**fitting)
    with pytest.raises(ValueError, match=message):
        group_cast(**fitting | changes)


def test_splits_are_ordered_by_rank_and_may_be_of_numpy():
    lists = [2, 0, 1], [[2, 0], [1], [0]], [1, 1], [1, 0]
    sizes, ranks, received, origins = (np.array(each) if i != 1 else each for i, each in enumerate(lists))
    for exchange in (exchange_of_splits(*lists, 3), exchange_of_splits(sizes, ranks, received, origins, 3)):
        assert exchange.send.tolist() == [[0, 0, 2], [0, 2, 3], [1, 2, 2], [2, 0, 2]]
        assert exchange.recv.tolist() == [[0, 1, 2], [1, 0, 1]]
        assert json.dumps([exchange.num_source, exchange.num_received]) == "[3, 2]"  # as other ranks are shown it


def uneven(rank: int, world_size: int) -> None:
    device, group = device_of_backend(), dist.group.WORLD
    whole = random_tensor(1, (3, 5, 2), torch.bfloat16).to(device)
    for sizes in ([1, 4], [5, 0]):
        mine = scatter_v(whole, group, dim=1, split_sizes=sizes)
        assert torch.equal(mine, whole.split(sizes, dim=1)[rank])
        assert torch.equal(all_gather_v(mine, group, dim=1), whole)
        assert torch.equal(all_gather_v(mine, group, dim=1, split_sizes=sizes), whole)
    assert torch.equal(scatter_v(whole[:, :4], group, dim=-2), whole[:, 2 * rank : 2 * rank + 2])
    # Rank r sends r + 1 columns to rank 0 and 3 to rank 1.
    first = rank + 1
    received = all2all_v(whole[:, : first + 3], group, [first, 3], [[1, 2], [3, 3]][rank], dim=1)
    sent = [whole[:, : r + 1] if rank == 0 else whole[:, r + 1 : r + 4] for r in range(2)]
    assert torch.equal(received, torch.cat(sent, dim=1))


def test_uneven_collectives(pool):
    pool.run(uneven)


def test_uneven_collectives_refuse_wrong_sizes():
    x = torch.zeros(4, 2)
    with pytest.raises(ValueError, match="one size per rank of the group of 1"):
        all_gather_v(x, None, split_sizes=[4, 4])
    with pytest.raises(ValueError, match="x has length 4 along dim 0, but its split size is 3"):
        all_gather_v(x, None, split_sizes=[3])
    with pytest.raises(ValueError, match=r"split_sizes \[3\] must add up to 4, not 3"):
        scatter_v(x, None, split_sizes=[3])
    with pytest.raises(ValueError, match="output_split_sizes must hold one size per rank"):
        all2all_v(x, None, [4], [])
    assert torch.equal(all_gather_v(x, None), x)


def in_inference_mode(rank: int, world_size: int, call: Callable[..., None], *arguments: object) -> None:
    with torch.inference_mode():
        call(rank, world_size, *arguments)


@pytest.mark.parametrize("arguments", [(cast, False, True), (cast, True, False), (reduce, "sum", True, None)])
def test_in_inference_mode(pool, arguments):
    pool.run(in_inference_mode, *arguments)
