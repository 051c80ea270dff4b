# SPDX-License-Identifier: Apache-2.0
"""Relays between virtual nodes: the same rows as directly, each across once, in every shape of nodes."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from magi_attention.plan.exchange import ExchangeTable
from magi_comm_grpcoll.relays import RelayExchange, relay_exchange
from magi_comm_grpcoll.tables import check_match
from tests.comm.test_native import fragmented_table
from tests.distributed.exchanges import RandomNeeds

shapes = st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 4), st.sampled_from([0.2, 0.5, 0.9]))


def expand(ranges: np.ndarray) -> np.ndarray:
    """``(n, 2)``: the peer and the row of every row."""
    rows = [(peer, row) for peer, start, stop in ranges.tolist() for row in range(start, stop)]
    return np.array(rows, np.int64).reshape(-1, 2)


def cast(tables: list[ExchangeTable], sources: list[np.ndarray]) -> list[np.ndarray]:
    """What every rank of a group receives; -1 where nothing is sent to."""
    check_match(tables)
    received = [np.full(table.num_received, -1) for table in tables]
    for rank, table in enumerate(tables):
        assert table.num_received >= table.recv[:, 2].max(initial=0)
        assert table.num_source == len(sources[rank]) >= table.send[:, 2].max(initial=0)
        assert (np.diff(table.send[:, 0]) >= 0).all()
        assert (np.diff(table.recv[:, 0]) >= 0).all()
        sent, landing = expand(table.send), expand(table.recv)
        for peer in range(len(tables)):
            rows = sources[rank][sent[sent[:, 0] == peer, 1]]
            places = expand(tables[peer].recv)
            received[peer][places[places[:, 0] == rank, 1]] = rows
        assert len(np.unique(landing[:, 1])) == len(landing)
    return received


def cast_over_nodes(relays: list[RelayExchange], per_node: int, sources: list[np.ndarray]) -> list[np.ndarray]:
    """The same over nodes of ``per_node`` ranks: in two hops, and with the rows of a node apart."""
    relayed: list[np.ndarray] = [np.empty(0, np.int64)] * len(relays)
    for place in range(per_node):
        alike = range(place, len(relays), per_node)
        arrived = cast([relays[rank].hops.inter for rank in alike], [sources[rank] for rank in alike])
        for rank, rows in zip(alike, arrived, strict=True):
            assert (rows >= 0).all()
            relayed[rank] = rows
    received = []
    for first in range(0, len(relays), per_node):
        node = range(first, first + per_node)
        held = [np.concatenate([sources[rank], relayed[rank]]) for rank in node]
        received += (together := cast([relays[rank].hops.intra for rank in node], held))
        near = cast([relays[rank].near for rank in node], [sources[rank] for rank in node])
        far = cast([relays[rank].far for rank in node], [relayed[rank] for rank in node])
        for both, one, other in zip(together, near, far, strict=True):
            assert ((one < 0) | (other < 0)).all()
            assert (np.maximum(one, other) == both).all()
    return received


def check(tables: list[ExchangeTable], per_node: int) -> None:
    relays = [relay_exchange(tables[rank % per_node :: per_node], per_node, rank) for rank in range(len(tables))]
    sources = [1000 * rank + np.arange(table.num_source) for rank, table in enumerate(tables)]
    expected = cast(tables, sources)
    for got, wanted in zip(cast_over_nodes(relays, per_node, sources), expected, strict=True):
        assert (got == wanted).all()
    for rank, exchange in enumerate(relays):
        across = expand(exchange.hops.inter.send)
        assert len(np.unique(across, axis=0)) == len(across)  # once to each node
        wanted = expand(tables[rank].send)
        nodes = np.unique(np.column_stack([wanted[:, 0] // per_node, wanted[:, 1]]), axis=0)
        assert len(across) == (nodes[:, 0] != rank // per_node).sum()  # and to no other


@given(shapes)
def test_relays_bring_what_the_tables_ask_for(shape):
    seed, num_nodes, per_node, share = shape
    needs = RandomNeeds(seed, num_nodes * per_node, share)
    check([needs.table(rank) for rank in range(needs.num_ranks)], per_node)


@given(shapes, st.integers(1, 5))
def test_ranges_of_several_rows_and_of_the_rank_itself(shape, rows):
    seed, num_nodes, per_node, _ = shape
    num_ranks = num_nodes * per_node
    check([fragmented_table(rank, num_ranks, 3, rows, seed) for rank in range(num_ranks)], per_node)


def test_partly_overlapping_ranges_cross_as_one():
    """Rank 0 sends rows 0 to 6 to rank 2, and 4 to 9 to rank 3, which are of the other node."""
    nothing = np.empty((0, 3), np.int64)
    tables = [
        ExchangeTable(np.array([(2, 0, 6), (3, 4, 9)]), nothing, 4, 10, 0),
        ExchangeTable(nothing, nothing, 4, 0, 0),
        ExchangeTable(nothing, np.array([(0, 0, 6)]), 4, 0, 6),
        ExchangeTable(nothing, np.array([(0, 0, 2), (0, 2, 5)]), 4, 0, 5),
    ]
    check(tables, 2)
    hops = relay_exchange(tables[::2], 2, 0).hops, relay_exchange(tables[::2], 2, 2).hops
    assert hops[0].inter.send.tolist() == [[1, 0, 9]]
    assert hops[1].inter.recv.tolist() == [[0, 0, 9]]
    assert hops[1].intra.send.tolist() == [[0, 0, 6], [1, 4, 9]]
