# SPDX-License-Identifier: Apache-2.0
"""Time index attention on this GPU: ``python benchmarks/index_attention.py``.

Every query attends to ``selected`` keys of its own, drawn at random from those up to itself. Beside the forward pass of
the chosen backend stand plain PyTorch (``magi_attention.kernels.indexed``), and causal attention to all keys by the
backend that ``auto`` takes for it: index attention pays where the last column is above 1. A time is the median of
several launches between CUDA events, after warm-up.
"""

import argparse
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from kernels import median_seconds
from torch import Tensor

from magi_attention.common.slices import SliceTable
from magi_attention.kernels.indexed import attend_to_indices
from magi_attention.kernels.protocol import AttentionCall, AttentionRequest, IndexCall
from magi_attention.kernels.registry import choose_backend, choose_for_indices


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


def measure(shape: Shape, repeat: int) -> str:
    """Draw tensors, time all, and return the row of the table."""
    q, k, v = (
        torch.randn(shape.tokens, heads, shape.dim, device="cuda", dtype=torch.bfloat16)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    lists = draw_lists(shape)
    call = IndexCall(lists, shape.dim**-0.5)
    request = AttentionRequest.of_tensors(q, k, v)
    backend = choose_for_indices(request)
    run: Callable[[], object] = lambda: attend_to_indices(q, k, v, call)  # noqa: E731
    if backend is not None:
        run = lambda: backend.forward_indices(q, k, v, call)  # noqa: E731
    part = slice(-PLAIN_QUERIES, None)
    few = IndexCall(lists[part], call.softmax_scale)
    plain: Callable[[], object] = lambda: attend_to_indices(q[part], k, v, few)  # noqa: E731
    causal = AttentionCall(SliceTable([[0, shape.tokens, 0, shape.tokens, 1]]), call.softmax_scale)
    dense = choose_backend(request.toward("forward", "causal"))
    dense_run: Callable[[], object] = lambda: dense.forward(q, k, v, causal)  # noqa: E731
    for each in (run, plain, dense_run):
        each()  # what is compiled or made once
    seconds, whole = median_seconds([run, dense_run], repeat)
    torch_seconds = median_seconds([plain], 3)[0] * shape.tokens / PLAIN_QUERIES
    pairs = int((lists >= 0).sum())
    gathered = 4 * pairs * shape.dim / seconds / 1e12
    speed = 4 * pairs * shape.heads // shape.kv_heads * shape.dim / seconds / 1e12
    name = "torch" if backend is None else getattr(backend, "name", "?")
    sizes = f"{shape.tokens:7}{shape.heads:4}/{shape.kv_heads}{shape.selected:9}{shape.dim:5}"
    return (
        f"{sizes}{name:>9}{seconds * 1e3:9.3f}{speed:9.0f}{gathered:9.2f}{torch_seconds * 1e3:10.1f}"
        f"{torch_seconds / seconds:8.1f}{whole * 1e3:10.3f}{whole / seconds:8.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--rows", type=int, default=len(SHAPES), help="measure the first so many")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/index_attention.py needs a GPU")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16")
    print(" tokens heads selected  dim  backend       ms  TFLOP/s     TB/s  torch ms   ratio causal ms   ratio")
    for shape in SHAPES[: options.rows]:
        print(measure(shape, options.repeat), flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
