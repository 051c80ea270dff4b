# SPDX-License-Identifier: Apache-2.0
"""Time attention kernels on this GPU: ``python benchmarks/kernels.py``. Every cell is TFLOP/s, forward / backward.

Rows are masks and lengths; columns our backends, beside cuDNN's and FlashAttention-4's own dense kernels and PyTorch's
FlexAttention, all in one run on the same tensors. ``auto`` repeats the figures of the backends that our registry
chooses for the row, which may differ by direction. FLOPs are those of the pairs that the mask keeps:
``4 * pairs * heads * dim`` forward, 2.5 times that backward. A time is the median of several launches between CUDA
events, after warm-up; those of a row take turns, one launch each in a random order, and what all launches of a cycle
have in common is taken out before: a GPU at its power limit runs faster and slower for seconds at a time. What a kernel
cannot do is left out; an error ends its cell alone and is told below the table.

The columns of ratios are ``auto`` over FlashAttention-4's own kernels, over the original relative to cuDNN's causal
attention, and over ``cudnn_flex``; below the table it says which bars (``benchmarks/kernel_bars.py``) hold. The rows
that have bars come first, and FlexAttention, which is compiled for every row, comes last, as a table of its own.
``--read`` shows the figures that an earlier run wrote to a file.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch._functorch.config
from kernel_bars import DIRECTIONS, Bar, Cell, bars, hopper_bars, summary
from numpy.typing import NDArray
from torch import Tensor

from magi_attention.cli.bench.timing import compare_in_cycles
from magi_attention.common import workloads
from magi_attention.common.slices import SliceTable
from magi_attention.kernels.protocol import AttentionCall, AttentionRequest
from magi_attention.kernels.registry import backends_for_slices, installed_backends
from magi_attention.kernels.tiles import row_intervals

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import FlexKernelOptions

MASKS = ("causal", "swa_causal_1024", "varlen_causal", "full", "varlen_full", "varlen_block_causal_4k")
NATIVE: dict[str, tuple[int | None, int | None]] = {
    "full": (None, None),
    "causal": (None, 0),
    "varlen_full": (None, None),
    "varlen_causal": (None, 0),
    "swa_causal_1024": (workloads.WINDOW - 1, 0),
}
BLOCK = 64
BLOCK_SHARES = {f"blocks_{percent}": percent / 100 for percent in (1, 5, 10)}
"""Masks of ``BLOCK`` by ``BLOCK`` blocks that keep a share of them at random, and those on the diagonal, by name."""

TOKENS = (32768, 8192, 16384, 4096, 65536)
DENSE_PAIRS = {"full": False, "causal": True}
LEFT_OUT = ("reference", "flex")
LAST = "flex-attention"
STARTED = time.perf_counter()


class Case(NamedTuple):
    """What every contender computes: q, k, v and dout are ``[tokens, heads, dim]``."""

    mask: str
    slices: SliceTable
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor


Passes = tuple[Callable[[], object], Callable[[], object]]
"""A forward and a backward pass, ready to be launched again and again."""


def kept_blocks(mask: str, tokens: int) -> NDArray[np.bool_]:
    """Which blocks a mask of ``BLOCK_SHARES`` keeps."""
    num_blocks = -(-tokens // BLOCK)
    kept = np.random.default_rng(0).random((num_blocks, num_blocks)) < BLOCK_SHARES[mask]
    return kept | np.eye(num_blocks, dtype=bool)


def make_slices(mask: str, tokens: int) -> SliceTable:
    """Build a mask by its name."""
    if mask not in BLOCK_SHARES:
        return workloads.make(mask, tokens)
    row, column = np.nonzero(kept_blocks(mask, tokens))
    starts = np.column_stack([row, row, column, column]) * BLOCK + np.array([0, BLOCK, 0, BLOCK])
    return SliceTable(np.column_stack([np.minimum(starts, tokens), np.zeros_like(row)]))


def by_backend(name: str, case: Case) -> Passes | None:
    """One of our backends."""
    backend = installed_backends()[name]
    if not backend.supports(AttentionRequest.of_tensors(case.q, case.k, case.v)):
        return None
    call = AttentionCall(case.slices, case.q.shape[-1] ** -0.5)
    tensors = (case.q, case.k, case.v)
    out, lse, _ = backend.forward(*tensors, call)
    return (
        lambda: backend.forward(*tensors, call),
        lambda: backend.backward(case.dout, *tensors, out, lse, None, call),
    )


def by_cudnn_sdpa(case: Case) -> Passes | None:
    """PyTorch's scaled_dot_product_attention by cuDNN; full and causal masks only."""
    if case.mask not in DENSE_PAIRS:
        return None
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (x.transpose(0, 1)[None].detach().requires_grad_() for x in (case.q, case.k, case.v))

    def forward() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=DENSE_PAIRS[case.mask], enable_gqa=True
            )

    return with_autograd(forward, (q, k, v), case.dout.transpose(0, 1)[None])


def by_fa4_native(case: Case) -> Passes | None:
    """FlashAttention-4's public functions, without our masks."""
    if case.mask not in NATIVE:
        return None
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    window = {"window_size": NATIVE[case.mask]}
    if case.mask.startswith("varlen"):
        leaves = tuple(x.detach().requires_grad_() for x in (case.q, case.k, case.v))
        ends = torch.tensor(workloads.document_ends(len(case.q)), dtype=torch.int32, device="cuda")
        longest = int(ends.diff().max())
        attend = partial(
            flash_attn_varlen_func,
            cu_seqlens_q=ends,
            cu_seqlens_k=ends,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            **window,
        )
        return with_autograd(lambda: attend(*leaves)[0], leaves, case.dout)
    leaves = tuple(x[None].detach().requires_grad_() for x in (case.q, case.k, case.v))
    return with_autograd(lambda: flash_attn_func(*leaves, **window)[0], leaves, case.dout[None])


def by_flex_attention(case: Case) -> Passes | None:
    """PyTorch's FlexAttention, its mask function reading the ends of each query's one interval, or the blocks."""
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

    total = len(case.q)
    if case.mask in BLOCK_SHARES:
        kept = torch.tensor(kept_blocks(case.mask, total), device="cuda")

        def is_seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return kept[query // BLOCK, key // BLOCK]
    else:
        intervals = row_intervals(case.slices.bands(), total)
        if (intervals.counts != 1).any():
            return None
        ends = (torch.tensor(each.astype(np.int32), device="cuda") for each in (intervals.starts, intervals.stops))
        starts, stops = ends

        def is_seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key >= starts[query]) & (key < stops[query])

    attend = torch.compile(flex_attention, dynamic=False)
    q, k, v = (x.transpose(0, 1)[None].contiguous().detach() for x in (case.q, case.k, case.v))
    forward = None
    if case.mask in BLOCK_SHARES:
        # Blocks that are all full suit it best, which its backward kernels for 128 dims can't have of this size.
        counts = kept.sum(1, dtype=torch.int32)[None, None]
        columns = kept.int().argsort(dim=1, descending=True, stable=True).int()[None, None]
        none = torch.zeros_like(counts)
        blocks = BlockMask.from_kv_blocks(none, columns, counts, columns, BLOCK, is_seen)
        sizes: FlexKernelOptions = {"BLOCK_M": BLOCK, "BLOCK_N": BLOCK}
        forward = partial(attend, q, k, v, block_mask=blocks, enable_gqa=True, kernel_options=sizes)
    block_mask = torch.compile(create_block_mask)(is_seen, None, None, total, total)
    leaves = q_leaf, k_leaf, v_leaf = tuple(x.clone().requires_grad_() for x in (q, k, v))
    passes = with_autograd(
        lambda: attend(q_leaf, k_leaf, v_leaf, block_mask=block_mask, enable_gqa=True),
        leaves,
        case.dout.transpose(0, 1)[None].contiguous(),
    )
    return (forward or passes[0], passes[1])


def with_autograd(forward: Callable[[], Tensor], leaves: tuple[Tensor, ...], dout: Tensor) -> Passes:
    """Passes of a differentiable function, compiled or not, of which the backward pass can be repeated."""
    torch._functorch.config.donated_buffer = False  # else one compiled for several lengths gives its memory away
    out = forward()
    return forward, lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def contenders() -> dict[str, Callable[[Case], Passes | None]]:
    """Everything that can be measured, by its name: our backends first."""
    ours = {name: partial(by_backend, name) for name in installed_backends() if name not in LEFT_OUT}
    others = {"cudnn-sdpa": by_cudnn_sdpa, "fa4-native": by_fa4_native, "flex-attention": by_flex_attention}
    return {**ours, **others}


def measure(case: Case, names: Sequence[str], repeat: int) -> list[Cell]:
    """The cells of a row: TFLOP/s of both passes, or why there are none."""
    cells: dict[str, Cell] = {name: {"mask": case.mask, "tokens": len(case.q), "contender": name} for name in names}
    ready: dict[str, Passes] = {}
    for name in names:
        with telling_errors(cells[name]):
            if (passes := contenders()[name](case)) is not None:
                for launch in passes * 3:
                    launch()
                torch.cuda.synchronize()
                ready[name] = passes
    flops = 4 * case.slices.area() * case.q.shape[1] * case.q.shape[2]
    for at, direction in enumerate(DIRECTIONS):
        seconds = typical_seconds([passes[at] for passes in ready.values()], repeat)
        for name, median in zip(ready, seconds, strict=True):
            cells[name][direction] = (1.0, 2.5)[at] * flops / median / 1e12
    del ready
    torch.cuda.empty_cache()
    return list(cells.values())


@contextmanager
def telling_errors(cell: Cell) -> Iterator[None]:
    """Note an error in the cell: whatever one kernel does, the others are measured."""
    try:
        yield
    except Exception as error:
        cell["error"] = f"{type(error).__name__}: {str(error).strip()[:200]}"


def typical_seconds(launches: Sequence[Callable[[], object]], repeat: int) -> list[float]:
    """The typical time on the device of ``repeat`` launches of each, in turns, each time in another order."""
    marks = [[[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in launches] for _ in range(repeat)]
    torch.cuda.synchronize()
    turns, shuffle = list(range(len(launches))), random.Random(0).shuffle
    for row in marks:
        shuffle(turns)  # a kernel that draws less power leaves the GPU faster for the next
        for turn in turns:
            start, stop = row[turn]
            start.record()
            launches[turn]()
            stop.record()
    torch.cuda.synchronize()
    taken = [[start.elapsed_time(stop) / 1e3 for start, stop in row] for row in marks]
    times, _ = compare_in_cycles(np.array(taken).T[:, :, None])
    return [float(each) for each in times]


def chosen(case: Case, row: list[Cell]) -> Cell:
    """The figures of the backends that ``auto`` takes for a row, and their names."""
    cell: Cell = {"mask": case.mask, "tokens": len(case.q), "contender": "auto"}
    by_name = {each["contender"]: each for each in row}
    request = AttentionRequest.of_tensors(case.q, case.k, case.v)
    names = dict(zip(DIRECTIONS, [each.name for each in backends_for_slices(case.slices, request)], strict=True))
    for direction, name in names.items():
        if direction in by_name.get(name, {}):
            cell[direction] = by_name[name][direction]
    return cell | {"backends": list(names.values())}


def make_case(mask: str, tokens: int, options: argparse.Namespace) -> Case:
    """Draw the tensors of a row."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(heads: int) -> Tensor:
        return torch.randn(tokens, heads, options.dim, generator=generator, device="cuda", dtype=torch.bfloat16)

    q, k, v, dout = (draw(heads) for heads in (options.heads, options.kv_heads, options.kv_heads, options.heads))
    return Case(mask, make_slices(mask, tokens), q, k, v, dout)


def show(cell: Cell) -> str:
    """A cell as the table has it. A backend that ``auto`` takes may not be among those that are measured."""
    if "error" in cell and "forward" not in cell:
        return "error"
    missing = "error" if "error" in cell else "–"
    texts = [f"{cell[direction]:.0f}" if direction in cell else missing for direction in DIRECTIONS]
    return "–" if set(texts) == {"–"} else " / ".join(texts)


def show_ratios(found: list[Bar]) -> str:
    """The ratios to each peer, forward / backward, those that miss their bar marked."""
    texts = []
    for peer in ("fa4-native", "original", "cudnn_flex"):
        of_peer = {bar.direction: bar for bar in found if (bar.peer, bar.ours) == (peer, "auto")}
        bars_of_peer = [of_peer.get(direction) for direction in DIRECTIONS]
        ratios = ["–" if bar is None else f"{bar.ratio:.2f}{'' if bar.holds else '!'}" for bar in bars_of_peer]
        texts.append("–" if set(ratios) == {"–"} else " / ".join(ratios))
    return "".join(f"{text:>16}" for text in texts)


def plot(cells: list[Cell], path: str) -> None:
    """Draw a panel for each mask and pass: TFLOP/s over tokens."""
    from matplotlib import pyplot

    masks = list(dict.fromkeys(cell["mask"] for cell in cells))
    figure, axes = pyplot.subplots(2, len(masks), figsize=(3.2 * len(masks), 6), sharex=True, squeeze=False)
    for column, mask in enumerate(masks):
        for row, direction in enumerate(DIRECTIONS):
            axis = axes[row][column]
            for name in dict.fromkeys(cell["contender"] for cell in cells):
                points = [c for c in cells if (c["mask"], c["contender"]) == (mask, name) and direction in c]
                points.sort(key=lambda cell: cell["tokens"])
                axis.plot([c["tokens"] for c in points], [c[direction] for c in points], marker="o", label=name)
            axis.set(title=f"{mask}\n{direction}", xscale="log", ylim=(0, None), ylabel="TFLOP/s" if not column else "")
    axes[0][0].legend(fontsize="x-small")
    figure.tight_layout()
    figure.savefig(path)


class Table:
    """The table, printed row by row.

    Args:
        names: its columns.
        with_bars: whether ``auto`` is among them, and ratios are shown.
    """

    def __init__(self, names: Sequence[str], *, with_bars: bool) -> None:
        self.with_bars = with_bars
        self.bars: list[Bar] = []
        self._sdpa_causal: Cell | None = None
        peers = ("fa4-native", "original", "cudnn_flex") if with_bars else ()
        print(f"{'mask':24}{'tokens':>7}", *(f"{name:>14}" for name in names), *(f"/{peer:>14}" for peer in peers))

    def add(self, row: list[Cell]) -> None:
        """Print a row, and see which bars it meets. The causal one of a length comes first."""
        mask, tokens = row[0]["mask"], row[0]["tokens"]
        sdpa = next((cell for cell in row if cell["contender"] == "cudnn-sdpa"), None)
        if mask == "causal":
            self._sdpa_causal = sdpa
        of_this_length = self._sdpa_causal is not None and self._sdpa_causal["tokens"] == tokens
        found = list(bars(row, self._sdpa_causal if of_this_length else None)) if self.with_bars else []
        self.bars += found
        ratios = show_ratios(found) if self.with_bars else ""
        print(f"{mask:24}{tokens:7}", *(f"{show(cell):>14}" for cell in row), ratios, flush=True)


def run(options: argparse.Namespace, names: list[str]) -> tuple[list[Cell], list[Bar]]:
    """Measure and print rows; returns their cells, and the bars that they have."""
    ours = [name for name in names if name in installed_backends()]
    table = Table([*names, *(["auto"] if ours else [])], with_bars=bool(ours))
    cells: list[Cell] = []
    for tokens in options.tokens:
        for mask in options.masks:
            if time.perf_counter() - STARTED > options.limit:
                print(f"{mask:24}{tokens:7} left out: {options.limit:.0f} s are over")
                continue
            case = make_case(mask, tokens, options)
            row = measure(case, names, options.repeat)
            row += [chosen(case, row)] if ours else []
            table.add(row)
            cells += row
    return cells, table.bars


def read(path: str) -> tuple[str, list[Cell], list[Bar]]:
    """Print the tables of a file; returns what it was measured on, its cells, and the bars that they have."""
    kept = json.loads(Path(path).read_text())
    found: list[Bar] = []
    for is_last, some in groupby(kept["cells"], key=lambda cell: cell["contender"] == LAST):
        rows = [list(row) for _, row in groupby(some, key=lambda cell: (cell["mask"], cell["tokens"]))]
        table = Table([cell["contender"] for cell in rows[0]], with_bars=not is_last)
        for row in rows:
            table.add(row)
        found += table.bars
    return kept["where"], kept["cells"], found


def rows_of(cells: list[Cell]) -> list[list[Cell]]:
    """The cells of each mask and length, of both tables."""
    rows: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        rows.setdefault((cell["mask"], cell["tokens"]), []).append(cell)
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--masks", nargs="+", default=MASKS, choices=[*workloads.WORKLOADS, *BLOCK_SHARES])
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument(
        "--backends", nargs="+", help="contenders, ours or others; by default all", choices=contenders()
    )
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--limit", type=float, default=float("inf"), help="begin no row after so many seconds")
    parser.add_argument("--json", help="write all cells to this file")
    parser.add_argument("--plot", help="draw them into this file (.png, .pdf or .svg)")
    parser.add_argument("--read", help="measure nothing, but show the cells of this file")
    options = parser.parse_args()
    if options.read:
        where, cells, found = read(options.read)
        print(where)
    elif not torch.cuda.is_available():
        sys.exit("benchmarks/kernels.py needs a GPU")
    else:
        names = options.backends or list(contenders())
        shape = f"{options.heads}/{options.kv_heads} heads of {options.dim}, bfloat16"
        where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {shape}"
        print(where)
        cells, found = [], []
        if first := [name for name in names if name != LAST]:
            cells, found = run(options, first)
        if LAST in names:
            cells += run(options, [LAST])[0]
    found += [bar for row in rows_of(cells) for bar in hopper_bars(row)]
    print(*(bar for bar in found if bar.ours == "hopper" or not bar.holds), *summary(found), sep="\n")
    for message in dict.fromkeys(f"{cell['contender']}: {cell['error']}" for cell in cells if "error" in cell):
        print(message)
    if options.json:
        Path(options.json).write_text(json.dumps({"where": where, "cells": cells}, indent=1))
    if options.plot:
        plot(cells, options.plot)


if __name__ == "__main__":
    main()
