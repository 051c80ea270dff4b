# SPDX-License-Identifier: Apache-2.0
"""Groups over several nodes: by direct connections inside each, each row once across, by puts or all-to-all."""

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

from magi_attention.comm.group import group_rank
from magi_attention.comm.hierarchical import GroupCollectivesOfHop, HierarchicalCollectives, receive_buffers, then
from magi_attention.comm.protocol import ReduceOp, RowsThere, Work
from magi_attention.comm.routes import Places
from magi_attention.plan.exchange import ExchangeTable
from magi_attention.utils.tensors import in_memory
from magi_attention.utils.torch_modes import without_grad
from magi_comm_grpcoll.handshake import Handshake
from magi_comm_grpcoll.plans import gather_tables
from magi_comm_grpcoll.relays import RelayExchange, relay_exchange


class RelayedCollectives:
    """Group cast and group reduce over nodes of equally many ranks, numbered node by node.

    The first run of every exchange table is a collective of the host. See :mod:`magi_comm_grpcoll.relays` for the way
    that rows take. A reduce adds up inside each node first, in float32, and what crosses is rounded to the dtype of the
    partial results.

    Args:
        handshake: with the ranks with this rank's place in their nodes.
        rank: this rank in the whole group.
        inter: of the ranks with this rank's place in their nodes.
        intra: of the ranks of this rank's node.
        per_node: how many these are.
    """

    name = "native"
    needs_multiprocessors = True

    def __init__(
        self,
        handshake: Handshake,
        rank: int,
        inter: GroupCollectivesOfHop,
        intra: GroupCollectivesOfHop,
        per_node: int,
    ) -> None:
        self._handshake, self._rank, self._per_node = handshake, rank, per_node
        self._inter, self._intra = inter, intra
        self._hops = HierarchicalCollectives(inter, intra)

    @without_grad
    def cast(
        self,
        tensors: Sequence[Tensor],
        table: ExchangeTable,
        out: Sequence[Tensor] | None = None,
        own_places: Places | None = None,
        lend: bool = False,
    ) -> Work[list[Tensor]]:
        """See :class:`~magi_attention.comm.protocol.GroupCollectives`. Nothing is lent.

        Rows of this node travel in it while those of others cross.
        """
        relays = self._relayed(table)
        tensors = [in_memory(x) for x in tensors]
        received = receive_buffers(tensors, table.num_received, out, own_places)
        relayed = [x.new_empty((relays.far.num_source, *x.shape[1:])) for x in tensors]
        across = self._inter.cast(tensors, relays.hops.inter, out=relayed)
        near = self._intra.cast(tensors, relays.near, out=received)

        @without_grad
        def pass_on() -> list[Tensor]:
            return self._intra.cast(relayed, relays.far, out=received).wait()

        return then([across, near], self._intra, pass_on, [*tensors, *relayed, *received])

    def reduce(
        self,
        partials: Sequence[Tensor],
        table: ExchangeTable,
        into: Sequence[Tensor],
        op: ReduceOp = "sum",
        partial_lse: Tensor | None = None,
        into_lse: Tensor | None = None,
        own_places: Places | None = None,
        rows_there: RowsThere | None = None,
    ) -> Work[None]:
        """See :class:`~magi_attention.comm.protocol.GroupCollectives`."""
        return self._hops.reduce(partials, self._relayed(table).hops, into, op, partial_lse, into_lse, own_places)

    def _relayed(self, table: ExchangeTable) -> RelayExchange:
        return table.derived((self, "relays"), lambda: self._plan(table))

    def _plan(self, table: ExchangeTable) -> RelayExchange:
        alike = gather_tables(self._handshake, "group collective over nodes", table)
        if table.num_ranks != len(alike) * self._per_node:
            raise ValueError(
                f"an exchange among {table.num_ranks} ranks can't run in a group of {len(alike) * self._per_node}"
            )
        return relay_exchange(alike, self._per_node, self._rank)


def ranks_per_node(hosts: Sequence[str]) -> int:
    """How many ranks every host has, given that of each rank; 0 unless they are equally many, numbered by host."""
    per_node = hosts.count(hosts[0])
    firsts = hosts[::per_node]
    in_order = [host for host in firsts for _ in range(per_node)] == [*hosts] and len({*firsts}) == len(firsts)
    return per_node if in_order else 0


def subgroups(group: dist.ProcessGroup, per_node: int, timeout_s: float) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """The ranks with this rank's place in their nodes, and those of its node. All ranks of the group must call it."""
    ranks, (node, place) = dist.get_process_group_ranks(group), divmod(group_rank(group), per_node)
    members = ranks[place::per_node], ranks[node * per_node : (node + 1) * per_node]
    inter, intra = (
        dist.new_group(
            each,
            timeout=timedelta(seconds=timeout_s),
            backend=dist.get_backend(group),
            use_local_synchronization=True,  # ranks outside the group don't come
        )
        for each in members
    )
    return inter, intra
