# SPDX-License-Identifier: Apache-2.0
"""What the ranks do in every stage, measured on plans that exist: exact, but it takes the plans of all ranks."""

from collections.abc import Sequence

import numpy as np

from magi_attention.plan.build import Plan, Stage
from magi_attention.plan.exchange import ExchangeTable, TwoHopExchange
from magi_attention.plan.relays import TwoHopLoads
from magi_attention.plan.stage_work import StageWork, count_tiles, group_traffic, real_tokens
from magi_attention.plan.traffic import LinkRows, Table


def work_of_plans(plans: Sequence[Plan], ranks_per_node: int | None = None) -> StageWork:
    """Measure the stages of all ranks' plans, given in the ranks' order.

    Args:
        plans: one for each rank.
        ranks_per_node: neighboring ranks that share a node; None if all do. Two-hop exchanges know it themselves.
    """
    num_ranks = len(plans)
    stages = list(zip(*[plan.stages for plan in plans], strict=True))
    traffic = np.zeros((num_ranks, num_ranks), np.int64)
    links = []
    for each in stages:
        loads, rows = _link_loads(each, ranks_per_node or num_ranks)
        links.append(loads)
        traffic += rows
    return StageWork(
        tokens=real_tokens(plans[0].layout),
        pairs=np.array([[stage.slices.area() for stage in plan.stages] for plan in plans]),
        tiles=np.array([[count_tiles(stage.slices.bands()).sum() for stage in plan.stages] for plan in plans]),
        links=LinkRows(*np.array(links).transpose(1, 2, 0)),
        hops=np.array([2 if isinstance(each[0].exchange, TwoHopExchange) else 1 for each in stages]),
        queries_travel=np.array([each[0].queries_travel for each in stages]),
        traffic=group_traffic(traffic),
    )


def _link_loads(stages: Sequence[Stage], ranks_per_node: int) -> tuple[LinkRows, Table]:
    """One stage of all ranks: what each receives and sends, and who from whom."""
    exchanges = [stage.exchange for stage in stages]
    if isinstance(exchanges[0], TwoHopExchange):
        loads = _two_hop_loads([each for each in exchanges if isinstance(each, TwoHopExchange)])
        return loads.by_rank, loads.traffic
    counts = [each.recv_counts if isinstance(each, ExchangeTable) else [0] * len(stages) for each in exchanges]
    traffic = np.array(counts)
    node = np.arange(len(stages)) // ranks_per_node
    inside = np.where(node[:, None] == node, traffic, 0)
    between = traffic - inside
    return LinkRows(between.sum(1), between.sum(0), inside.sum(1), inside.sum(0)), traffic


def _two_hop_loads(exchanges: Sequence[TwoHopExchange]) -> TwoHopLoads:
    nodes, places = exchanges[0].inter.num_ranks, exchanges[0].intra.num_ranks
    inter = np.array([each.inter.recv_counts for each in exchanges]).reshape(nodes, places, nodes).transpose(0, 2, 1)
    intra = np.array([each.intra.recv_counts for each in exchanges]).reshape(nodes, places, places)
    intra[:, np.arange(places), np.arange(places)] = 0  # a relay's own copy of what it relays
    return TwoHopLoads(inter, intra)
