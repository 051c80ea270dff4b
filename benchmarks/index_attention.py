# SPDX-License-Identifier: Apache-2.0
"""Time index attention on this GPU: ``python benchmarks/index_attention.py``.

Every query attends to ``selected`` keys of its own, drawn at random from those up to itself. Beside each pass of the
chosen backend stand plain PyTorch (``magi_attention.kernels.indexed``), and causal attention to all keys by the backend
that ``auto`` takes for it: index attention pays where the last column is above 1. The backward pass is timed with
gradients of keys added as they come, and in a fixed order. ``--flex`` adds PyTorch's FlexAttention, which looks the
keys up in a mask of all pairs, where that is not too large. A time is the median of several launches between CUDA
events, after warm-up.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from kernels import typical_seconds, with_autograd
from torch import Tensor

from magi_attention.common.slices import SliceTable
from magi_attention.kernels.indexed import attend_to_indices, differentiate_by_indices
from magi_attention.kernels.protocol import AttentionCall, AttentionRequest, IndexCall
from magi_attention.kernels.registry import choose_backends, choose_for_indices
from magi_attention.testing.lists import mask_of_lists


class Shape(NamedTuple):
    """A row: tokens, query and key heads, keys of each query, head dim."""

    tokens: int
    heads: int
    kv_heads: int
    selected: int
    dim: int


SHAPES = (
    Shape(8192, 64, 1, 2048, 128),
    Shape(32768, 64, 1, 2048, 128),
    Shape(65536, 64, 1, 2048, 128),
    Shape(8192, 64, 8, 1024, 128),
    Shape(32768, 64, 8, 512, 128),
    Shape(32768, 64, 1, 2048, 64),
    Shape(32768, 64, 1, 2048, 256),
)
PLAIN_QUERIES = 1024
"""Of plain PyTorch, which would take seconds for all; its time is scaled."""

MOST_PAIRS_OF_FLEX = 1 << 27
"""Bytes of the mask that FlexAttention reads."""


def draw_lists(shape: Shape) -> Tensor:
    """Rows of keys, ``[tokens, kv_heads, selected]``; the first queries have fewer."""
    order = torch.arange(shape.selected, device="cuda")
    seen = torch.arange(1, shape.tokens + 1, device="cuda")[:, None, None]
    # One key from each of equal parts of what a query sees: different, random, and quick to draw.
    jitter = torch.rand(shape.tokens, shape.kv_heads, shape.selected, device="cuda")
    first = order * seen // shape.selected
    size = (order + 1) * seen // shape.selected - first
    keys = (first + torch.minimum((jitter * size).int(), size - 1)).int()
    few = torch.where(order < seen, order, -1).int()
    return torch.where(seen < shape.selected, few, keys)


class Tensors(NamedTuple):
    """What a row computes with."""

    q: Tensor
    k: Tensor
    v: Tensor
    call: IndexCall
    out: Tensor
    lse: Tensor
    dout: Tensor

    @classmethod
    def draw(cls, shape: Shape) -> "Tensors":
        """Normal tensors in bfloat16."""
        q, k, v, dout = (
            torch.randn(shape.tokens, heads, shape.dim, device="cuda", dtype=torch.bfloat16)
            for heads in (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
        )
        call = IndexCall(draw_lists(shape), shape.dim**-0.5)
        backend = choose_for_indices(AttentionRequest.of_tensors(q, k, v)).forward
        attend = attend_to_indices if backend is None else backend.forward_indices
        out, lse, _ = attend(q, k, v, call)
        return cls(q, k, v, call, out, lse, dout)

    def last(self, num_queries: int) -> "Tensors":
        """The same with few queries."""
        part = slice(-num_queries, None)
        call = replace(self.call, indices=self.call.indices[part])
        return self._replace(q=self.q[part], call=call, **{x: getattr(self, x)[part] for x in ("out", "lse", "dout")})


Run = Callable[[], object]


def contenders(x: Tensors) -> dict[str, dict[str, Run]]:
    """For each pass what is timed, by column."""
    request = AttentionRequest.of_tensors(x.q, x.k, x.v)
    tensors, few, num = (x.q, x.k, x.v), x.last(PLAIN_QUERIES), len(x.q)
    chosen = choose_for_indices(request)
    attend = attend_to_indices if chosen.forward is None else chosen.forward.forward_indices
    differentiate = differentiate_by_indices if chosen.backward is None else chosen.backward.backward_indices
    dense, causal = choose_backends(request), AttentionCall(SliceTable([[0, num, 0, num, 1]]), x.call.softmax_scale)
    dense_out, dense_lse, _ = dense.forward.forward(*tensors, causal)
    fixed = replace(x.call, deterministic=True)
    return {
        "forward": {
            "ms": partial(attend, *tensors, x.call),
            "torch": partial(attend_to_indices, few.q, x.k, x.v, few.call),
            "causal": partial(dense.forward.forward, *tensors, causal),
        },
        "backward": {
            "ms": partial(differentiate, x.dout, *tensors, x.out, x.lse, None, x.call),
            "fixed": partial(differentiate, x.dout, *tensors, x.out, x.lse, None, fixed),
            "torch": partial(differentiate_by_indices, few.dout, few.q, x.k, x.v, few.out, few.lse, None, few.call),
            "causal": partial(dense.backward.backward, x.dout, *tensors, dense_out, dense_lse, None, causal),
        },
    }


def with_flex(x: Tensors) -> dict[str, Run]:
    """Both passes of FlexAttention."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = mask_of_lists(x.call.indices, len(x.k)).transpose(0, 1).contiguous()
    group, num = x.q.shape[1] // x.k.shape[1], len(x.q)
    q, k, v, dout = (each.transpose(0, 1)[None].contiguous() for each in (x.q, x.k, x.v, x.dout))

    def is_listed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask[head // group, query, key]

    blocks = create_block_mask(is_listed, None, x.q.shape[1], num, num, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend() -> Tensor:
        out = compiled(q, k, v, block_mask=blocks, scale=x.call.softmax_scale, enable_gqa=True)
        assert isinstance(out, Tensor)
        return out

    forward = torch.no_grad()(attend)
    leaves = tuple(each.requires_grad_() for each in (q, k, v))
    return {"forward": forward, "backward": with_autograd(attend, leaves, dout)[1]}


def measure(shape: Shape, repeat: int, *, flex: bool) -> list[str]:
    """Draw tensors, time all, and return the rows of the table, one for each pass."""
    x = Tensors.draw(shape)
    columns = contenders(x)
    if flex and shape.tokens * shape.tokens * shape.kv_heads <= MOST_PAIRS_OF_FLEX:
        for direction, run in with_flex(x).items():
            columns[direction]["flex"] = run
    pairs = int((x.call.indices >= 0).sum()) * shape.heads // shape.kv_heads
    sizes = f"{shape.tokens:7}{f'{shape.heads}/{shape.kv_heads}':>7}{shape.selected:9}{shape.dim:5}"
    return [
        f"{sizes}{direction:>10}" + figures(direction, runs, pairs, shape, repeat)
        for direction, runs in columns.items()
    ]


def figures(direction: str, runs: dict[str, Run], pairs: int, shape: Shape, repeat: int) -> str:
    """Time one pass, and return its part of the row."""
    for run in runs.values():
        run()  # what is compiled or made once
    few = {"torch": runs.pop("torch")}
    ms = {name: 1e3 * each for name, each in zip(runs, typical_seconds(list(runs.values()), repeat), strict=True)}
    ms["torch"] = 1e3 * typical_seconds(list(few.values()), 3)[0] * shape.tokens / PLAIN_QUERIES
    flop = pairs * shape.dim * (4 if direction == "forward" else 10)
    text = f"{ms['ms']:9.3f}{flop / ms['ms'] / 1e9:9.0f}"
    for name in ("fixed", "torch", "flex", "causal"):
        text += f"{ms[name]:11.3f}{ms[name] / ms['ms']:7.2f}" if name in ms else f"{'-':>11}{'-':>7}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--rows", type=int, default=len(SHAPES), help="measure the first so many")
    parser.add_argument("--flex", action="store_true", help="also PyTorch's FlexAttention")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/index_attention.py needs a GPU")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16; each ratio is over the first ms")
    columns = "".join(f"{f'{name} ms':>11}  ratio" for name in ("fixed", "torch", "flex", "causal"))
    print(f" tokens  heads selected  dim      pass       ms  TFLOP/s{columns}")
    for shape in SHAPES[: options.rows]:
        print(*measure(shape, options.repeat, flex=options.flex), sep="\n", flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
