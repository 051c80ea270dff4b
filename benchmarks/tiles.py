# SPDX-License-Identifier: Apache-2.0
"""Time the tables that block-sparse kernels read, and show their size: ``python benchmarks/tiles.py``.

For each mask and number of tokens, in both directions together (queries to keys, keys to queries), with tiles of
128 x 128. *plan* is the classification into runs of full and partial tiles, on the host; *lists* their expansion into
index lists, *rows* the interval tables of rows and columns; each on the host in numpy and, behind it, on the device in
torch, the lists padded, upload and waiting included. *sm_90* and *sm_100* are all that the backend ``blackwell`` does
before it can launch one forward and one backward pass of such a mask with 128 dims and 8 key heads, from the slices on:
it looks for packed documents, finds the tiles of its own sizes, and puts its tables on the device. (Masks that its
kernels know themselves, such as *causal*, need no tables.) Times are the best of several, in milliseconds. *full* and
*partial* count the tiles of one direction, *runs* what is uploaded of them, *MB* is the size of all tables on the
device (flex's padding of both lists to a common width not included).
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch

from magi_attention.common import bands as band
from magi_attention.common import workloads
from magi_attention.common.slices import SliceTable
from magi_attention.kernels.device_tiles import DeviceIntervals, DeviceLists, device_row_intervals, padded_lists
from magi_attention.kernels.tiles import RowIntervals, TileRuns, row_intervals, tile_runs
from magi_attention.testing.tiles import IndexLists
from magi_kernels_blackwell.fa4 import tables as fa4
from magi_kernels_blackwell.masks import packed_mask

BLOCK = 128
HEAD_DIM, KEY_HEADS = 128, 8
MOST_HOST_INDICES = 1 << 26
"""Beyond it the host's lists are not made: a dense mask of a million tokens takes gigabytes as int64."""


def best_ms(run: Callable[[], object], repeat: int, wait: Callable[[], object]) -> float:
    """The shortest of several runs."""
    times = []
    for _ in range(repeat):
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def measure(name: str, tokens: int, device: torch.device, repeat: int) -> None:
    """Measure one row of the table and print it."""
    slices = workloads.make(name, tokens)
    bands = slices.bands()
    directions = [bands, band.transpose(bands)]

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def plan() -> list[TileRuns]:
        return [tile_runs(each, tokens, tokens, BLOCK, BLOCK) for each in directions]

    def host_rows() -> list[RowIntervals]:
        return [row_intervals(each, tokens) for each in directions]

    def device_rows() -> list[DeviceIntervals]:
        return [device_row_intervals(each, tokens, device) for each in directions]

    lists = [runs for tiles in plan() for runs in (tiles.full, tiles.partial)]

    def host_lists() -> list[IndexLists]:
        return [IndexLists.from_intervals(each) for each in lists]

    def device_lists() -> list[DeviceLists]:
        return [padded_lists(each, device) for each in lists]

    def fa4_tables(arch: int) -> list[object]:
        mask = SliceTable(slices.rows)  # nothing of it is known yet
        packed_mask(mask, tokens, tokens)
        forward = fa4.forward_tables(mask, tokens, tokens, fa4.forward_tiling(arch, HEAD_DIM, HEAD_DIM), device)
        if arch == 90:
            tiling = fa4.grouped_tiling(HEAD_DIM)
            return [forward, fa4.run_tables(mask, tokens, tokens, KEY_HEADS, tiling, device)]
        tiling = fa4.backward_tiling(HEAD_DIM)
        return [forward, fa4.backward_tables(mask, tokens, tokens, tiling, device, ranks=False)]

    indices = sum(int(each.sizes.sum()) for each in lists)
    times = [
        best_ms(plan, repeat, wait),
        best_ms(host_lists, repeat, wait) if indices <= MOST_HOST_INDICES else float("nan"),
        best_ms(device_lists, repeat, wait),
        best_ms(host_rows, repeat, wait),
        best_ms(device_rows, repeat, wait),
        *(best_ms(partial(fa4_tables, arch), repeat, wait) for arch in (90, 100)),
    ]
    tables = [tensor for pair in (*device_lists(), *device_rows()) for tensor in pair]
    megabytes = sum(tensor.numel() * tensor.element_size() for tensor in tables) / 1e6
    full_tiles, partial_tiles = (int(each.sizes.sum()) for each in lists[:2])
    runs = sum(len(each.starts) for each in lists)
    cells = [f"{value:9.2f}" for value in times]
    print(
        f"{name:24}{tokens:>9,}", *cells, f"{full_tiles:>11,}{partial_tiles:>9,}{runs:>9,}{megabytes:9.1f}", flush=True
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masks", nargs="+", default=list(workloads.WORKLOADS), choices=list(workloads.WORKLOADS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1 << 16, 1 << 18, 1 << 20])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    print(f"Tiles of {BLOCK} x {BLOCK}, both directions; device: {name}, torch {torch.__version__}; times in ms")
    heads = ["plan", "lists", "device", "rows", "device", "sm_90", "sm_100"]
    print(
        f"{'mask':24}{'tokens':>9}",
        *(f"{head:>9}" for head in heads),
        f"{'full':>11}{'partial':>9}{'runs':>9}{'MB':>9}",
    )
    for mask in args.masks:
        for tokens in args.tokens:
            measure(mask, tokens, device, args.repeat)


if __name__ == "__main__":
    main()
