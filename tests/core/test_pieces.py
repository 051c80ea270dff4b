# SPDX-License-Identifier: Apache-2.0
"""Rows of several tensors that travel tensor by tensor: nothing is copied where they are runs already."""

from contextlib import nullcontext
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from magi_attention.comm.alltoall import AllToAllCollectives
from magi_attention.comm.packing import (
    Pieces,
    can_lie_apart,
    lay_out_apart,
    packed_for_peers,
    row_formats,
    runs_for_peers,
)
from magi_attention.comm.routes import routes_of
from magi_attention.plan.exchange import ExchangeTable

SHAPES = [((8, 16), torch.bfloat16), ((40,), torch.float64), ((64,), torch.float32)]
RUNS = {
    "one run": [[0, 2, 5], [1, 5, 6], [2, 6, 9]],
    "a run for each": [[0, 6, 9], [1, 0, 1], [2, 3, 5]],
    "several runs": [[0, 0, 1], [0, 4, 6], [2, 7, 9]],
    "nothing": [],
}


def table_of(runs: list[list[int]]) -> ExchangeTable:
    """Of the rank that receives these rows of three peers, and sends none."""
    recv = np.array(runs, np.int64).reshape(-1, 3)
    return ExchangeTable(send=np.empty((0, 3), np.int64), recv=recv, num_ranks=3, num_source=0, num_received=9)


@pytest.mark.parametrize("is_contiguous", [True, False])
@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
def test_pieces_hold_the_rows_of_each_peer(runs, is_contiguous):
    draw = torch.Generator().manual_seed(0)
    tensors = [torch.randn(9, *shape, generator=draw, dtype=torch.float64).to(dtype) for shape, dtype in SHAPES]
    if not is_contiguous:
        tensors[1] = torch.cat([tensors[1]] * 2, 1)[:, :40]
    routes = routes_of(table_of(runs), torch.device("cpu"))
    are_views = is_contiguous and runs is not RUNS["several runs"]
    pieces = runs_for_peers(tensors, routes)
    assert (pieces is not None) == are_views
    if pieces is None:
        pieces = packed_for_peers(tensors, routes)
    rows = [[row for peer, start, stop in runs if peer == rank for row in range(start, stop)] for rank in range(3)]
    layout = lay_out_apart(row_formats(tensors), routes.num_arriving)
    arrived = torch.empty(routes.num_arriving, layout.num_words, dtype=torch.int64)
    for into, sent in zip(layout.pieces(arrived, routes.recv_counts), pieces, strict=True):
        for target, piece in zip(into, sent, strict=True):
            target.copy_(piece)
    for tensor, column, of_each in zip(tensors, layout.all_columns(arrived), pieces, strict=True):
        assert torch.equal(column, tensor[[*chain(*rows)]])
        shared = [piece.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() for piece in of_each]
        assert shared == [are_views] * 3


def test_short_rows_and_single_tensors_lie_together():
    long, short = torch.empty(3, 8, 16, dtype=torch.bfloat16), torch.empty(3, 8, dtype=torch.float32)
    assert can_lie_apart(row_formats([long, long]))
    assert not can_lie_apart(row_formats([long, short]))
    assert not can_lie_apart(row_formats([long]))
    assert not can_lie_apart(row_formats([long, torch.empty(3, 129, dtype=torch.bfloat16)]))  # no whole words
    assert not can_lie_apart(row_formats([long, torch.empty(3, 33, dtype=torch.float64)]))  # not aligned for vectors


def test_a_table_is_prepared_for_each_way_of_sending(monkeypatch):
    whole = np.array([[0, 0, 9]])
    table = ExchangeTable(send=whole, recv=whole, num_ranks=1, num_source=9, num_received=9)
    packs, sends_pieces, tensors = AllToAllCollectives(None), AllToAllCollectives(None), [torch.empty(9, 64)] * 2
    monkeypatch.setattr(sends_pieces, "_can_send_pieces", lambda device: True)
    layouts = [
        each._prepared(table, ("sum",), tensors, lambda table: None, may_lie_apart=True)[1]
        for each in (packs, sends_pieces, packs)
    ]
    assert [layout.is_apart for layout in layouts] == [False, True, False]


@pytest.mark.parametrize("fails", [False, True])
def test_pieces_of_all_tensors_go_by_one_kernel(fails):
    """Also after an error the group goes on to send each call by itself."""
    said = []

    def alltoall(received, sent, options):
        said.append((received, sent, options.asyncOp))
        if fails:
            raise RuntimeError("no kernel")

    group = SimpleNamespace(
        _start_coalescing=lambda device: said.append("together"),
        alltoall=alltoall,
        _end_coalescing=lambda device: said.append("end") or SimpleNamespace(wait=lambda: said.append("wait")),
    )
    collectives, pieces = AllToAllCollectives(None), Pieces(sent=[["k"], ["v"]], landed=[["K"], ["V"]])
    collectives.group = group
    with pytest.raises(RuntimeError, match="no kernel") if fails else nullcontext():
        collectives._send(pieces, torch.empty(0), ([1], [1]), async_op=False)
    keys, values = (["K"], ["k"], False), (["V"], ["v"], False)
    assert said == (["together", keys, "end"] if fails else ["together", keys, values, "end", "wait"])
