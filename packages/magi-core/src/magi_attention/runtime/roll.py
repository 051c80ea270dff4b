# SPDX-License-Identifier: Apache-2.0
"""Roll a dispatched sequence as if it were whole."""

from typing import Any

from torch import Tensor

from magi_attention.comm.protocol import GroupCollectives
from magi_attention.kernels.autograd import KernelFunction, on_real_memory, only_once_differentiable
from magi_attention.plan.layout import Layout
from magi_attention.plan.roll import roll_exchange
from magi_attention.runtime.rows import concatenate
from magi_attention.utils.torch_modes import outside_inference_mode


@outside_inference_mode
def roll_rows(x: Tensor, shift: int, layout: Layout, rank: int, collectives: GroupCollectives) -> Tensor:
    """Roll local rows in dim 0 by ``shift`` along the real global sequence; padding stays as it is. Differentiable."""
    return _Roll.apply(x, shift, layout, rank, collectives)


def _rolled(x: Tensor, shift: int, layout: Layout, rank: int, collectives: GroupCollectives) -> Tensor:
    if shift % layout.num_real == 0:
        return x.clone()
    rolled = collectives.cast([x], roll_exchange(layout, rank, shift)).wait()[0]
    return concatenate([rolled, x[len(rolled) :]])


class _Roll(KernelFunction):
    @staticmethod
    @on_real_memory
    def forward(ctx: Any, x: Tensor, shift: int, layout: Layout, rank: int, collectives: GroupCollectives) -> Tensor:
        ctx.shift, ctx.where = shift, (layout, rank, collectives)
        return _rolled(x, shift, *ctx.where)

    @staticmethod
    @only_once_differentiable
    @on_real_memory
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _rolled(grad, -ctx.shift, *ctx.where), None, None, None, None
