# SPDX-License-Identifier: Apache-2.0
"""Random exchange tables, made alike on every rank, and what they must do to rows."""

import numpy as np
import torch

from magi_attention.plan.exchange import ExchangeTable, TwoHopExchange


class RandomNeeds:
    """Which rows every rank has, and which (owner, row) it needs in which order.

    Attributes:
        num_rows: rows of each rank.
        needs: for each rank an ``(n, 2)`` array of (owner, row of the owner), in the order of its receive buffer.
    """

    def __init__(self, seed: int, num_ranks: int, share: float = 0.5, max_rows: int = 12) -> None:
        random = np.random.default_rng(seed)
        self.num_ranks = num_ranks
        self.num_rows = random.integers(0, max_rows, num_ranks)
        everything = np.array([(r, i) for r in range(num_ranks) for i in range(self.num_rows[r])]).reshape(-1, 2)
        self.needs = []
        for _ in range(num_ranks):
            needed = everything[random.random(len(everything)) < share * random.integers(0, 3)]
            self.needs.append(random.permutation(needed) if random.random() < 0.5 else needed)

    def table(self, rank: int) -> ExchangeTable:
        """One row per range, but for the ranges that happen to touch."""
        send = [(peer, row, row + 1) for peer in range(self.num_ranks) for row in self.rows_sent(rank, peer)]
        recv = [
            (owner, i, i + 1)
            for owner in range(self.num_ranks)
            for i in np.flatnonzero(self.needs[rank][:, 0] == owner)
        ]
        return ExchangeTable(
            send=np.array(send, np.int64).reshape(-1, 3),
            recv=np.array(recv, np.int64).reshape(-1, 3),
            num_ranks=self.num_ranks,
            num_source=int(self.num_rows[rank]),
            num_received=len(self.needs[rank]),
        )

    def rows_sent(self, owner: int, peer: int) -> list[int]:
        """The owner's rows that ``peer`` needs, in the order in which it stores them."""
        needs = self.needs[peer]
        return needs[needs[:, 0] == owner, 1].tolist()

    def received(self, sources: list[torch.Tensor], rank: int) -> torch.Tensor:
        """What a cast must bring to ``rank``, given every rank's source."""
        rows = [sources[owner][row] for owner, row in self.needs[rank]]
        return torch.stack(rows) if rows else sources[rank][:0]

    def partials_of(self, owner: int, row: int) -> list[tuple[int, int]]:
        """The (rank, row of its receive buffer) of everybody who got a row, in the order of the ranks."""
        wanted = (owner, row)
        return [
            (rank, i) for rank, needs in enumerate(self.needs) for i, need in enumerate(needs) if (*need,) == wanted
        ]


def two_hop(needs: RandomNeeds, rank: int, per_node: int) -> TwoHopExchange:
    """The same rows in two hops over nodes of ``per_node`` ranks."""
    node, place = divmod(rank, per_node)
    num_nodes = needs.num_ranks // per_node

    def missed_by(node: int) -> list[tuple[int, int]]:
        """The rows of other nodes that some rank of the node needs."""
        members = range(node * per_node, (node + 1) * per_node)
        return sorted({(*map(int, need),) for r in members for need in needs.needs[r] if need[0] // per_node != node})

    def relay_of(rank: int) -> list[tuple[int, int]]:
        return [(owner, row) for owner, row in missed_by(rank // per_node) if owner % per_node == rank % per_node]

    num_own = int(needs.num_rows[rank])
    relay = relay_of(rank)
    inter = ExchangeTable(
        send=np.array(
            [
                (peer, row, row + 1)
                for peer in range(num_nodes)
                for owner, row in missed_by(peer)
                if owner == rank and peer != node
            ],
            np.int64,
        ).reshape(-1, 3),
        recv=np.array([(owner // per_node, i, i + 1) for i, (owner, _) in enumerate(relay)], np.int64).reshape(-1, 3),
        num_ranks=num_nodes,
        num_source=num_own,
        num_received=len(relay),
    )
    held = {(rank, row): row for row in range(num_own)} | {row: num_own + i for i, row in enumerate(relay)}
    send, recv = [], []
    for peer in range(per_node):
        for owner, row in needs.needs[node * per_node + peer]:
            if owner % per_node == place and (owner, row) in held:
                send.append((peer, held[owner, row], held[owner, row] + 1))
        recv += [(peer, i, i + 1) for i in np.flatnonzero(needs.needs[rank][:, 0] % per_node == peer)]
    intra = ExchangeTable(
        send=np.array(send, np.int64).reshape(-1, 3),
        recv=np.array(recv, np.int64).reshape(-1, 3),
        num_ranks=per_node,
        num_source=num_own + len(relay),
        num_received=len(needs.needs[rank]),
    )
    return TwoHopExchange(inter, intra)


def random_tensor(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """On the CPU, so that it is the same on every rank, whatever its device."""
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator).to(dtype)


def single_rows(rows: torch.Tensor) -> np.ndarray:
    """Rows as runs of one each."""
    return rows.numpy()[:, None] + [0, 1]
