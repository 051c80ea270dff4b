# SPDX-License-Identifier: Apache-2.0
"""The rates that a group plans with: found in this process or its cache folder, else measured once, alike on all ranks.

The group's first rank decides: what it finds holds for all, whatever their own files say. If it finds nothing, all
ranks measure, and the slowest of each counts.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from hashlib import sha256
from typing import TypeVar

import torch
import torch.distributed as dist

from magi_attention.comm.agreement import check_agreement, run_together
from magi_attention.comm.group import group_rank, group_size, has_peers
from magi_attention.comm.protocol import GroupCollectives
from magi_attention.env import general
from magi_attention.plan.rates import Cluster, Rates, default_rates
from magi_attention.runtime.key import DistAttnRuntimeKey
from magi_attention.runtime.machine import Layer, Machine, count_ranks_per_node, machine_of
from magi_attention.runtime.measure import KernelTimes, LinkTimes, measure_kernels, measure_links
from magi_attention.runtime.rates_file import load_rates, save_rates

SIGNIFICANT_DIGITS = 4

Each = TypeVar("Each")

logger = logging.getLogger(__name__)

# What each group agreed on: the same on all its ranks, so that none of them asks again while another doesn't.
_agreed: dict[tuple[tuple[int, ...], Machine], Rates] = {}


def agree_on_cluster(key: DistAttnRuntimeKey, layer: Layer, collectives: GroupCollectives) -> Cluster:
    """The rates for ``key`` and who shares a node, the same on all ranks of its group, which must all call this.

    Nothing is measured, sent or kept while a CUDA graph is captured, or for a group of torch's backend "fake".

    Args:
        key: the key; of a group of several ranks.
        layer: what it computes.
        collectives: how its rows travel.

    Raises:
        RuntimeError: on every rank, if ranks don't come or are about something else.
    """
    ranks_per_node = count_ranks_per_node(key.cp_group, key.cp_mesh)
    machine = machine_of(layer, key.cp_group, collectives.name, ranks_per_node)
    rates = _agreed.get((key.group_ranks, machine))
    is_capturing = layer.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if rates is None and (is_capturing or not has_peers(key.cp_group)):
        rates = default_rates(machine.device)
    elif rates is None:
        rates = _agreed[key.group_ranks, machine] = _agree(key, layer, machine, collectives)
    return Cluster.of_nodes(rates, ranks_per_node)


def _agree(key: DistAttnRuntimeKey, layer: Layer, machine: Machine, collectives: GroupCollectives) -> Rates:
    options = key.dist_attn_config.runtime_config
    if options.check_plan:
        # A rank that failed, or that needs no rates, must not leave the others in a collective.
        asked = ("rates", options, layer.shape, collectives.name)
        check_agreement(sha256(repr(asked).encode()).digest(), key.cp_group, float(options.check_plan_timeout or 0))
    found: list[Rates | None] = [None]
    if group_rank(key.cp_group) == 0:
        found = [load_rates(machine)]
        if found[0] is None and not general.is_rate_measurement_enable():
            found = [default_rates(machine.device)]
    dist.broadcast_object_list(found, group=key.cp_group, group_src=0)
    if found[0] is not None:
        return found[0]
    mesh = key.cp_mesh if options.hierarchical_comm else None
    mesh_shape = None if mesh is None else (mesh.size(0), mesh.size(1))
    try:
        return measure_together(layer, machine, key.cp_group, collectives, mesh_shape)
    except MeasurementError as error:
        logger.warning("%s; round numbers for such a device stand in", error)
        return default_rates(machine.device)


class MeasurementError(RuntimeError):
    """A rank can't measure, for want of memory, say; raised on all ranks."""


def measure_together(
    layer: Layer,
    machine: Machine,
    group: dist.ProcessGroup | None,
    collectives: GroupCollectives,
    mesh_shape: tuple[int, int] | None = None,
    on_step: Callable[[str], None] = lambda step: None,
) -> Rates:
    """Measure on all ranks of ``group``, which must all call this, and keep the result in every node's cache folder.

    Args:
        layer: the attention to measure.
        machine: what the rates hold for.
        group: the group; None for this process alone, of which kernels and memory are measured.
        collectives: how rows travel.
        mesh_shape: ``(nodes, ranks per node)`` for exchanges in two hops; None for direct ones.
        on_step: hears what is about to be measured.

    Returns:
        The slowest rank's rates; for links that the group doesn't have, default ones.

    Raises:
        MeasurementError: a rank's kernels failed; on all ranks.
        RuntimeError: an exchange failed on some rank; on all ranks.
    """
    start, rank = time.perf_counter(), group_rank(group)
    on_step("kernels and memory")
    kernels = _gather(_try_kernels(layer), group)
    failures = {number: each for number, each in enumerate(kernels) if isinstance(each, str)}
    if failures:
        raise MeasurementError(f"the rates of {machine.device} can't be measured: rank by rank, {failures}")
    links: Sequence[LinkTimes] = []
    if group is not None and group_size(group) > 1:
        on_step("links")

        def measure() -> LinkTimes:
            # Another thread has another current device.
            with torch.cuda.device(layer.device) if layer.device.type == "cuda" else nullcontext():
                return measure_links(layer, collectives, rank, machine.num_ranks, machine.ranks_per_node, mesh_shape)

        links = _gather(run_together(measure, "measuring links", group), group)
    rates = _slowest([each for each in kernels if isinstance(each, KernelTimes)], links, machine.device)
    path = save_rates(machine, rates) if rank % machine.ranks_per_node == 0 else None
    if rank == 0:
        logger.info(
            "measured rates of %s on %d ranks in %.2f s, kept in %s: %s",
            machine.device,
            machine.num_ranks,
            time.perf_counter() - start,
            path,
            rates.to_json(),
        )
    return rates


def _try_kernels(layer: Layer) -> KernelTimes | str:
    try:
        return measure_kernels(layer)
    except RuntimeError as error:  # other ranks are waiting
        return f"{type(error).__name__}: {error}"


def _gather(mine: Each, group: dist.ProcessGroup | None) -> list[Each]:
    """Every rank's object, in the order of the ranks."""
    everyone: list[Each] = [mine] * group_size(group)
    if group_size(group) > 1:
        dist.all_gather_object(everyone, mine, group=group)
    return everyone


def _slowest(kernels: Sequence[KernelTimes], links: Sequence[LinkTimes], device: str) -> Rates:
    """The least of each rate, and the greatest of each latency, rounded; the default for what nobody measured."""
    values = default_rates(device).to_json()
    for name in values:
        measured = [value for each in (*kernels, *links) if (value := getattr(each, name, None)) is not None]
        if measured:
            slowest = max(measured) if "latency" in name else min(measured)
            values[name] = float(f"{slowest:.{SIGNIFICANT_DIGITS}g}")
    return Rates(**values)
