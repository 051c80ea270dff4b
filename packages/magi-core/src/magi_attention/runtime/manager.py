# SPDX-License-Identifier: Apache-2.0
"""What stands behind a key: the rank's plan and everything that is derived from it."""

from dataclasses import replace
from hashlib import sha256

import torch
from torch import Tensor

from magi_attention.comm.agreement import check_agreement, failures_reported
from magi_attention.comm.alltoall import AllToAllCollectives
from magi_attention.comm.group import group_size
from magi_attention.comm.registry import make_collectives
from magi_attention.common.enum import AttnRole, AttnType
from magi_attention.common.forward_meta import AttnForwardMeta
from magi_attention.plan.layout import Layout
from magi_attention.plan.rates import Cluster, LayerShape, default_rates
from magi_attention.runtime.autograd import dist_attn_func
from magi_attention.runtime.costs import PassCosts
from magi_attention.runtime.dispatch import check_same_on_all_ranks, dispatch_rows, undispatch_rows
from magi_attention.runtime.dispatch_meta import DispatchMeta
from magi_attention.runtime.job import DistAttnRuntime
from magi_attention.runtime.key import DistAttnRuntimeKey
from magi_attention.runtime.machine import count_ranks_per_node, device_name, group_device, layer_of
from magi_attention.runtime.planning import check_plannable, make_plan, stage_options
from magi_attention.runtime.rates import agree_on_cluster
from magi_attention.runtime.roll import roll_rows
from magi_attention.utils.torch_modes import in_fake_tensor_mode, outside_fake_tensor_mode, outside_inference_mode


class DistAttnRuntimeMgr:
    """Carries out what is asked with a key: dispatch, attention, roll.

    Attributes:
        key: the key.
        layout: who owns which queries.
        key_layout: who owns which keys and values; in self-attention the same object as ``layout``.
        rank: this process's rank in the key's group.
        dist_attn_runtime: the plan and the means to carry it out.
        checked_calls: shapes, dtypes, devices and options of calls whose arguments have been found right.
    """

    def __init__(self, key: DistAttnRuntimeKey, dist_attn_runtime: DistAttnRuntime) -> None:
        plan = dist_attn_runtime.plan
        self.key = key
        self.layout = plan.layout
        self.key_layout = plan.key_layout
        self.rank = plan.rank
        self.dist_attn_runtime = dist_attn_runtime
        self.dist_attn_config = key.dist_attn_config
        self.checked_calls: set[object] = set()
        self._row_collectives = AllToAllCollectives(key.cp_group)
        key.note_local_rows(self.num_local_rows(AttnRole.QUERY), self.num_local_rows(AttnRole.KEY))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DistAttnRuntimeMgr):
            return NotImplemented
        same_plan = self.dist_attn_runtime.plan.digest == other.dist_attn_runtime.plan.digest
        return same_plan and self.key.group_ranks == other.key.group_ranks and self.rank == other.rank

    __hash__ = None  # type: ignore[assignment]

    @property
    def dispatch_meta_q(self) -> DispatchMeta:
        """The layout of queries as lists."""
        return self._dispatch_meta(AttnRole.QUERY)

    @property
    def dispatch_meta_k(self) -> DispatchMeta:
        """The layout of keys as lists."""
        return self._dispatch_meta(AttnRole.KEY)

    def _dispatch_meta(self, attn_role: AttnRole) -> DispatchMeta:
        attn_type = AttnType.SELF_ATTN if self.key.is_same_source else AttnType.CROSS_ATTN
        return DispatchMeta.from_layout(self.layout_of(attn_role), self.rank, attn_role, attn_type)

    def layout_of(self, attn_role: AttnRole) -> Layout:
        """Who owns which rows of what has this role; values lie with their keys.

        Raises:
            ValueError: ``attn_role`` is no role.
        """
        if not isinstance(attn_role, AttnRole):
            raise ValueError(f"attn_role must be an AttnRole, got {attn_role!r}")
        return self.layout if attn_role is AttnRole.QUERY else self.key_layout

    def num_local_rows(self, attn_role: AttnRole) -> int:
        """Rows of this rank, padding included."""
        return int(self.layout_of(attn_role).rows_per_rank[self.rank])

    def dispatch(self, x: Tensor, pad_value: float = 0.0, attn_role: AttnRole = AttnRole.QUERY) -> Tensor:
        """This rank's rows of the global ``x`` ``[S, ...]``."""
        self.check_sanity(x)
        return dispatch_rows(x, self.layout_of(attn_role), self.rank, self.key.cp_group, pad_value)

    def check_sanity(self, x: Tensor) -> None:
        """Raise ``RuntimeError`` on every rank if they dispatch different ``x``, or by other plans, if asked to."""
        if self.dist_attn_config.runtime_config.sanity_check:
            check_same_on_all_ranks(x, self.dist_attn_runtime.plan.digest, self.key.cp_group)

    def undispatch(self, x: Tensor, is_partial_grad: bool = False, attn_role: AttnRole = AttnRole.QUERY) -> Tensor:
        """The global tensor ``[S, ...]`` of all ranks' local ``x``."""
        return undispatch_rows(x, self.layout_of(attn_role), self.rank, self.key.cp_group, is_partial_grad)

    def dispatch_qo(self, x: Tensor, pad_value: float = 0.0) -> Tensor:
        """:meth:`dispatch` by the layout of queries and outputs."""
        return self.dispatch(x, pad_value, AttnRole.QUERY)

    def dispatch_kv(self, x: Tensor, pad_value: float = 0.0) -> Tensor:
        """:meth:`dispatch` by the layout of keys and values."""
        return self.dispatch(x, pad_value, AttnRole.KEY)

    def undispatch_qo(self, x: Tensor, is_partial_grad: bool = False) -> Tensor:
        """:meth:`undispatch` by the layout of queries and outputs."""
        return self.undispatch(x, is_partial_grad, AttnRole.QUERY)

    def undispatch_kv(self, x: Tensor, is_partial_grad: bool = False) -> Tensor:
        """:meth:`undispatch` by the layout of keys and values."""
        return self.undispatch(x, is_partial_grad, AttnRole.KEY)

    def roll(self, x: Tensor, shift: int, dim: int, attn_role: AttnRole = AttnRole.QUERY) -> Tensor:
        """Roll the real global sequence, of which ``x`` holds local rows in ``dim``, by ``shift``."""
        layout = self.layout_of(attn_role)
        return roll_rows(x.movedim(dim, 0), shift, layout, self.rank, self._row_collectives).movedim(0, dim)

    roll_simple = roll

    def calc_attn(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor | None = None,
        softmax_scale: float | None = None,
        softcap: float = 0.0,
        return_max_logits: bool = False,
    ) -> tuple[Tensor, AttnForwardMeta]:
        """See :func:`magi_attention.runtime.autograd.dist_attn_func`."""
        return dist_attn_func(q, k, v, self.dist_attn_runtime, sink, softmax_scale, softcap, return_max_logits)

    @outside_inference_mode
    def get_position_ids(
        self, attn_role: AttnRole = AttnRole.QUERY, device: torch.device | str | None = None
    ) -> Tensor:
        """``[n_local]`` int64: the global position of each local row; padding repeats the last real position.

        The same tensor object is returned each time, until somebody changes it in place, except of fake tensors. By
        default it lies on the CPU for a gloo group or without GPU, else on the current CUDA device.
        """
        layout, rank = self.layout_of(attn_role), self.rank
        where = group_device(self.key.cp_group) if device is None else torch.device(device)
        if in_fake_tensor_mode():
            return _positions(layout, rank).to(where)
        name, make = ("position ids", rank, where), lambda: _positions(layout, rank).to(where)
        ids = layout.derived(name, make)
        if ids._version:  # changed in place, by somebody whose own it is from now on
            layout.forget(name)
            ids = layout.derived(name, make)
        return ids

    def release_tables(self) -> None:
        """Drop what takes memory on the device and can be derived again: tile lists, index tensors, position ids."""
        self.layout.forget_derived()
        self.key_layout.forget_derived()
        self.dist_attn_runtime.forget_tables()


@outside_inference_mode
@outside_fake_tensor_mode
def build_manager(
    key: DistAttnRuntimeKey, layout: Layout | None = None, key_layout: Layout | None = None
) -> DistAttnRuntimeMgr:
    """Plan for a new key and check that all ranks planned the same.

    Args:
        key: the key.
        layout: who owns which queries, to keep that; None to deal them anew.
        key_layout: the same for keys, which in self-attention share the layout of queries.

    Raises:
        ValueError: no slice has queries and keys, or two slices keep a common pair.
        NotImplementedError: an overlap algorithm without implementation.
        RuntimeError: on every rank, if the ranks disagree or one of them failed; it names them.
    """
    group, config = key.cp_group, key.dist_attn_config
    options = config.runtime_config
    layer = cluster = None
    with failures_reported(group, bool(options.check_plan)):
        check_plannable(key)
        collectives = make_collectives(group, key.cp_mesh, config)
        if config.overlap_config.degree == "auto" and group_size(group) > 1:
            layer = layer_of(key)
    if layer is not None:
        cluster = agree_on_cluster(key, layer, collectives)
    with failures_reported(group, bool(options.check_plan)):
        overlap = stage_options(config.overlap_config)
        if layer is not None:
            overlap = replace(overlap, cluster=cluster, shape=layer.shape)
        plan = make_plan(key, overlap, layout, key_layout)
    if options.check_plan:
        asked = (options, key.num_heads_q, key.num_heads_kv, key.head_dim, collectives.name)
        digest = sha256(plan.digest + repr(asked).encode()).digest()
        check_agreement(digest, group, float(options.check_plan_timeout or 0))
    return DistAttnRuntimeMgr(key, DistAttnRuntime(plan, collectives, group, options, _costs(key, cluster)))


def _costs(key: DistAttnRuntimeKey, cluster: Cluster | None) -> PassCosts:
    """What the rank's kernels are arranged by: measured rates where the key planned with such, else round numbers."""
    shape = LayerShape(key.num_heads_q, key.num_heads_kv, key.head_dim)
    share_node = count_ranks_per_node(key.cp_group, key.cp_mesh) == group_size(key.cp_group)
    rates = cluster or default_rates(device_name(group_device(key.cp_group)))
    return PassCosts.of_layer(rates, shape, ranks_share_node=share_node)


def _positions(layout: Layout, rank: int) -> Tensor:
    return torch.from_numpy(layout.positions(rank)).clamp(max=layout.num_real - 1)
