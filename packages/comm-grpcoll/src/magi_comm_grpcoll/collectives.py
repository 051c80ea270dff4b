# SPDX-License-Identifier: Apache-2.0
"""The transport ``native`` of MagiAttention: the context of a process group, or all-to-all where there can't be one."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from magi_attention.comm.alltoall import AllToAllCollectives
from magi_attention.comm.group import GroupHandle, group_rank, has_peers, is_destroyed, num_groups
from magi_attention.comm.packing import row_formats
from magi_attention.comm.protocol import ReduceOp, RowsThere, Work
from magi_attention.comm.routes import Places
from magi_attention.kernels.protocol import Support
from magi_attention.plan.exchange import ExchangeTable, TwoHopExchange
from magi_comm_grpcoll.capability import host, reason_against
from magi_comm_grpcoll.combine import formats_combine
from magi_comm_grpcoll.context import ContextOptions, GroupContext, group_timeout_s
from magi_comm_grpcoll.errors import CapacityError, NotNativeError
from magi_comm_grpcoll.fabric import ibgda_fact, nvshmem_fact
from magi_comm_grpcoll.handshake import Handshake
from magi_comm_grpcoll.nodes import RelayedCollectives, ranks_per_node, subgroups

logger = logging.getLogger(__name__)

# One for each process group, since a context's memory and flags are the group's.
_contexts: dict[str, tuple[GroupHandle, GroupContext | RelayedCollectives | None]] = {}


class NativeCollectives:
    """Group cast and group reduce of a process group over direct connections between GPUs.

    All objects of one group share its context. A group over several hosts has one on each of them, and rows cross to
    each host once, put by NVSHMEM. Where GPUs can't exchange natively, all ranks of their host go by all-to-all, and
    where NVSHMEM can't be used, all rows between hosts do; the first rank logs why.

    Args:
        group: the process group; None for this process alone.
    """

    name = "native"

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.fallback = AllToAllCollectives(group)
        self.context = context_of(group) if group is not None and has_peers(group) else None
        self.needs_multiprocessors = self.context is None or self.context.needs_multiprocessors

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group."""
        return self.fallback.group

    @classmethod
    def supports(cls, device: torch.device) -> Support:
        """Whether tensors of a device could travel natively, whoever the other ranks are."""
        reason = reason_against(device)
        return Support(not reason, reason)

    @classmethod
    def facts(cls) -> dict[str, str]:
        """What ``magi doctor`` says beyond that: what there is for rows between hosts."""
        return {"nvshmem": nvshmem_fact(), "ibgda": ibgda_fact()}

    def sends_early(self, table: ExchangeTable | TwoHopExchange, device: torch.device) -> bool:
        """See :class:`~magi_attention.comm.protocol.GroupCollectives`."""
        if self.context is None:
            return self.fallback.sends_early(table, device)
        return not self.needs_multiprocessors

    def cast(
        self,
        tensors: Sequence[Tensor],
        table: ExchangeTable | TwoHopExchange,
        out: Sequence[Tensor] | None = None,
        own_places: Places | None = None,
        lend: bool = False,
    ) -> Work[list[Tensor]]:
        """See :class:`~magi_attention.comm.protocol.GroupCollectives`."""
        if self.context is None:
            return self.fallback.cast(tensors, table, out, own_places, lend)
        return self.context.cast(tensors, _one_hop(table), out, own_places, lend)

    def reduce(
        self,
        partials: Sequence[Tensor],
        table: ExchangeTable | TwoHopExchange,
        into: Sequence[Tensor],
        op: ReduceOp = "sum",
        partial_lse: Tensor | None = None,
        into_lse: Tensor | None = None,
        own_places: Places | None = None,
        rows_there: RowsThere | None = None,
    ) -> Work[None]:
        """See :class:`~magi_attention.comm.protocol.GroupCollectives`.

        Other dtypes than those that the kernels combine go by all-to-all.
        """
        arguments: tuple[Any, ...] = (partials, table, into, op, partial_lse, into_lse, own_places, rows_there)
        sent = [*partials] if partial_lse is None else [*partials, partial_lse]
        targets = [*into] if into_lse is None else [*into, into_lse]
        if self.context is None:
            return self.fallback.reduce(*arguments)
        if isinstance(self.context, GroupContext) and not formats_combine(row_formats(sent), targets, op):
            return self.fallback.reduce(*arguments)
        return self.context.reduce(partials, _one_hop(table), *arguments[2:])


def context_of(group: dist.ProcessGroup) -> GroupContext | RelayedCollectives | None:
    """What all objects of a group share, made by the first call, a collective; None where there can't be one."""
    known = _contexts.get(group.group_name)
    if known is not None and known[0].group is group:
        return known[1]
    for name in [name for name, (handle, _) in _contexts.items() if handle.group and is_destroyed(handle.group)]:
        del _contexts[name]  # gives its memory back
    context = _make_context(group)
    _contexts[group.group_name] = GroupHandle(group), context
    return context


def _make_context(group: dist.ProcessGroup) -> GroupContext | RelayedCollectives | None:
    rank, device = group_rank(group), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    timeout_s = group_timeout_s(group, device)
    handshake = Handshake(group, timeout_s)
    answers = handshake.exchange(f"{num_groups()} {host()}".encode())
    counts, hosts = zip(*(answer.decode().split(" ", 1) for answer in answers), strict=True)
    per_node, reason = ranks_per_node(hosts), "its ranks are not numbered host by host, with equally many on each"
    if 1 < per_node < len(hosts):
        if len({*counts}) == 1:
            return relayed_over(group, per_node, timeout_s)
        reason = (
            f"its ranks are in {', '.join(counts)} process groups, and PyTorch makes groups of those of a host only "
            "where all are in equally many"
        )
    elif per_node:
        try:
            return GroupContext(group, ContextOptions(transport="put" if per_node == 1 else None))
        except (NotNativeError, CapacityError) as error:
            reason = str(error)
    if rank == 0:
        logger.warning("the native group collectives are replaced by all-to-all: %s", reason)
    return None


def relayed_over(group: dist.ProcessGroup, per_node: int, timeout_s: float) -> RelayedCollectives:
    """Collectives over nodes of so many ranks of a group each. All its ranks must call it."""
    inter, intra = subgroups(group, per_node, timeout_s)
    _contexts[inter.group_name] = GroupHandle(inter), _make_crossing(group, inter, timeout_s)
    hops = NativeCollectives(inter), NativeCollectives(intra)
    return RelayedCollectives(Handshake(inter, timeout_s), group_rank(group), *hops, per_node)


def _make_crossing(group: dist.ProcessGroup, inter: dist.ProcessGroup, timeout_s: float) -> GroupContext | None:
    """What carries rows between nodes: puts, if all ranks of all nodes can, else None for all-to-all."""
    context, reason = None, ""
    try:
        context = GroupContext(inter, ContextOptions(transport="put"))
    except (NotNativeError, CapacityError) as error:
        reason = str(error)
    answers = [answer.decode() for answer in Handshake(group, timeout_s).exchange(reason.encode())]
    if not (reason := next((answer for answer in answers if answer), "")):
        return context
    if context is not None:
        context.close()
    if group_rank(group) == 0:
        logger.warning("between hosts, the native group collectives are replaced by all-to-all: %s", reason)
    return None


def _one_hop(table: ExchangeTable | TwoHopExchange) -> ExchangeTable:
    if isinstance(table, TwoHopExchange):
        raise TypeError("a two-hop exchange needs HierarchicalCollectives, not NativeCollectives")
    return table
