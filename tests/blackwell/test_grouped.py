# SPDX-License-Identifier: Apache-2.0
"""How the Hopper backward pass for groups of heads is launched, with stand-ins for its kernels."""

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from magi_attention.common.slices import SliceTable
from magi_attention.kernels.protocol import AttentionCall
from magi_kernels_blackwell.fa4 import grouped


class Geometry(NamedTuple):
    dtype: torch.dtype
    head_dim: int
    head_dim_v: int
    group: int
    block_q: int
    softcap: float


def stand_in(geometries: list[Geometry]) -> SimpleNamespace:
    """Kernels whose results tell which heads they were given: each gradient is made of the tensors of its own heads."""

    def kernels(geometry: Geometry, has_dlse: bool) -> SimpleNamespace:
        geometries.append(geometry)

        def before(out, dout, dpsum, lse, lse2, dq_sum, *rest):
            dpsum.zero_()
            dpsum[..., : lse.shape[-1]] = (rest[2] if has_dlse else 0) + lse
            dq_sum.copy_((out + dout)[0].sum((0, 2))[None, :, None].expand_as(dq_sum))

        def main(q, k, v, dout, lse2, dpsum, dq_sum, dk, dv):
            assert dq_sum.shape[-1] <= grouped.MOST_ELEMENTS
            heads = (x.unflatten(2, (k.shape[2], -1)).sum(3) for x in (q, dout))
            of_rows = dpsum.sum(-1)[..., None]
            group = q.shape[2] // k.shape[2]
            for gradient, x, of_queries in zip((dk, dv), (k, v), heads, strict=True):
                gradient.copy_(group * x + of_queries.sum(1, keepdim=True) + of_rows)

        def after(dq_sum, dq, scale, *rest):
            dq.copy_(scale * dq_sum[:, None, :, :1].expand_as(dq))

        return SimpleNamespace(before=before, main=main, after=after)

    namespace = SimpleNamespace(
        Geometry=Geometry, kernels=kernels, Runs=lambda *tables: tables, arguments=lambda tensors, *rest: tensors
    )
    return SimpleNamespace(grouped=namespace, is_tracing=lambda: False)


@pytest.mark.parametrize("with_dlse", [False, True])
@pytest.mark.parametrize(("at_once", "group"), [(2, 6), (3, 6), (5, 6), (1, 6), (1, 7)])
def test_groups_too_long_for_32_bits_are_computed_in_parts(monkeypatch, at_once, group, with_dlse):
    draw = torch.Generator().manual_seed(0)
    num_q, num_k, heads_k, dim = 70, 40, 2, 8

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-3, 4, shape, generator=draw).float()

    dout, q, out = (integers(num_q, group * heads_k, dim) for _ in range(3))
    k, v = (integers(num_k, heads_k, dim) for _ in range(2))
    lse, dlse = integers(group * heads_k, num_q), integers(group * heads_k, num_q) if with_dlse else None
    call = AttentionCall(SliceTable([[0, num_q, 0, num_k, 0]]), 0.5)
    geometries: list[Geometry] = []
    library = stand_in(geometries)
    into = torch.empty_like(q)

    def launch(into: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        return grouped.launch_grouped_backward(library, 90, dout, q, k, v, out, lse, dlse, call, into)

    expected = launch(None)
    assert [each.group for each in geometries] == [group]
    geometries.clear()
    rows = 128  # whole tiles
    monkeypatch.setattr(grouped, "MOST_ELEMENTS", at_once * rows * dim)
    result = launch(into)
    heads = max(each for each in range(1, at_once + 1) if group % each == 0)
    assert [each.group for each in geometries] == [heads] * (heads_k * group // heads)
    assert result[0] is into
    for ours, wanted in zip(result, expected, strict=True):
        assert torch.equal(ours, wanted)


def test_a_million_tokens_of_sixteen_heads():
    assert grouped._heads_at_once(8, 2**20 * 128) == 8
    assert grouped._heads_at_once(16, 2**20 * 128) == 8
    assert grouped._heads_at_once(7, 2**22 * 128) == 1


def test_more_than_a_single_head_can_have_is_refused_before_anything_is_launched():
    assert grouped._heads_at_once(2, 2**31 - 1) == 1
    with pytest.raises(RuntimeError, match="2,147,483,648 are too many: use more GPUs, or the backend 'hopper'"):
        grouped._heads_at_once(2, 2**24 * 128)
