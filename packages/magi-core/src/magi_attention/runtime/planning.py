# SPDX-License-Identifier: Apache-2.0
"""From a key to this rank's plan."""

from magi_attention.comm.group import group_rank, group_size
from magi_attention.common.enum import AttnMaskType
from magi_attention.common.errors import MagiValueError
from magi_attention.common.range import AttnRange
from magi_attention.common.slices import SliceTable, find_double_cover
from magi_attention.config import GreedyOverlapAlg, OverlapConfig, SequentialDispatchAlg, UniformOverlapAlg
from magi_attention.plan.build import Plan, build_plan
from magi_attention.plan.chunks import DealKeys
from magi_attention.plan.dispatch import make_layout
from magi_attention.plan.key_dispatch import make_key_layout
from magi_attention.plan.layout import Layout
from magi_attention.plan.qo import RowCosts
from magi_attention.plan.stages import StageOptions
from magi_attention.runtime.key import DistAttnRuntimeKey


def check_plannable(key: DistAttnRuntimeKey) -> None:
    """Raise if the key cannot be planned.

    Raises:
        ValueError: no slice has queries and keys, or two slices keep a common pair.
        NotImplementedError: an overlap algorithm without implementation.
    """
    if isinstance(key.dist_attn_config.overlap_config.alg, GreedyOverlapAlg):
        raise NotImplementedError("GreedyOverlapAlg is not implemented; use UniformOverlapAlg")
    q0, q1, k0, k1, _ = key.slices.rows.T
    if not ((q1 > q0) & (k1 > k0)).any():
        raise ValueError("every slice of the mask is empty: none has both queries and keys")
    doubled = None if key.dist_attn_config.runtime_config.skip_overlap_check else find_double_cover(key.slices)
    if doubled is not None:
        first, second = (_describe_slice(key.slices, number) for number in doubled)
        raise MagiValueError(f"{first} and {second} keep a common (query, key) pair; every pair may be kept only once")


def _describe_slice(slices: SliceTable, number: int) -> str:
    q0, q1, k0, k1, kind = slices.rows[number].tolist()
    return f"slice {number} (q {AttnRange(q0, q1)}, k {AttnRange(k0, k1)}, {AttnMaskType.from_int_type(kind).value})"


def stage_options(overlap: OverlapConfig) -> StageOptions:
    """How to cut stages by the configuration, without measured rates."""
    assert isinstance(overlap.alg, UniformOverlapAlg), overlap.alg
    return StageOptions(
        degree=overlap.degree if isinstance(overlap.degree, int) else None,
        max_degree=overlap.dynamic_max_degree or 1,
        min_piece=overlap.min_chunk_size,
        max_pieces=overlap.max_num_chunks,
        seconds_per_pair=overlap.calc_cost_factor,
        seconds_per_row=overlap.comm_cost_factor,
        random_seed=(overlap.alg.random_seed or 0) if overlap.alg.random_costs else None,
    )


def make_plan(key: DistAttnRuntimeKey, overlap: StageOptions, layout: Layout | None, key_layout: Layout | None) -> Plan:
    """This rank's plan.

    Args:
        key: the key, which :func:`check_plannable` has passed.
        overlap: how to cut stages.
        layout: who owns which queries, to keep that; None to deal them anew.
        key_layout: the same for keys, which in self-attention share the layout of queries.
    """
    options, num_ranks = key.dist_attn_config.runtime_config, group_size(key.cp_group)
    mesh = key.cp_mesh if options.hierarchical_comm else None
    if key.is_same_source:
        layout = key_layout = layout or _layout_for(key, num_ranks)
    else:
        layout, key_layout = _layouts_for(key, num_ranks, layout, key_layout)
    return build_plan(
        key.slices,
        layout,
        group_rank(key.cp_group),
        overlap,
        mesh_shape=None if mesh is None else (mesh.size(0), mesh.size(1)),
        row_costs=_row_costs(key) if options.qo_comm else None,
        key_layout=key_layout,
    )


def _layouts_for(
    key: DistAttnRuntimeKey, num_ranks: int, layout: Layout | None, key_layout: Layout | None
) -> tuple[Layout, Layout]:
    """The layouts of queries and of keys of different sequences; those that are given are kept."""

    def deal_keys(queries: Layout) -> Layout:
        return key_layout or make_key_layout(
            key.slices,
            queries,
            num_real=key.total_seqlen_k - key.pad_size_k,
            total=key.total_seqlen_k,
            chunk_size=key.chunk_size_k,
            is_permutable=key.is_k_permutable,
        )

    layout = layout or _layout_for(key, num_ranks, deal_keys)
    return layout, deal_keys(layout)


def _layout_for(key: DistAttnRuntimeKey, num_ranks: int, deal_keys: DealKeys | None = None) -> Layout:
    return make_layout(
        key.slices,
        num_real=key.total_seqlen_q - key.pad_size,
        total=key.total_seqlen_q,
        chunk_size=key.chunk_size,
        num_ranks=num_ranks,
        algorithm=key.dist_attn_config.dispatch_config.alg if key.is_q_permutable else SequentialDispatchAlg(),
        deal_keys=deal_keys,
        is_even=key.dist_attn_config.dispatch_config.chunk_size is not None,
    )


def _row_costs(key: DistAttnRuntimeKey) -> RowCosts:
    options = key.dist_attn_config.runtime_config
    return RowCosts.of_heads(
        key.num_heads_q,
        key.num_heads_kv,
        key.head_dim,
        forward_high_precision=bool(options.forward_high_precision_reduce),
        backward_high_precision=bool(options.backward_high_precision_reduce),
    )
