# SPDX-License-Identifier: Apache-2.0
"""A few small launches of every kind of kernel, for NVIDIA's compute-sanitizer to watch: ``test_sanitizer_gpu.py``."""

import argparse
from itertools import product
from pathlib import Path

import torch

from magi_attention.common.slices import SliceTable
from magi_attention.kernels.protocol import AttentionCall, IndexCall
from magi_attention.testing.lists import random_lists
from magi_attention.testing.stages import random_inputs
from magi_kernels_hopper import BACKEND, backward, forward, index, index_backward, index_lists, tables
from magi_kernels_hopper.variants import backward_variants

ROWS = [[0, 100, 0, 150, 0], [100, 300, 50, 250, 1], [310, 320, 150, 170, 3], [310, 320, 0, 20, 2]]


def main(dims: list[int]) -> None:
    for dim in dims:
        x = random_inputs(330, 300, heads=(4, 1), dims=(dim, dim), dtype=torch.bfloat16, device="cuda")
        for pairs in (0.0, 100.0):
            tables.TALL_PAIRS = pairs
            call = AttentionCall(SliceTable(ROWS), 0.1, max_logits=True)
            out, lse, _ = BACKEND.forward(*x[:3], call)
            BACKEND.forward_onto(out, lse, *x[:3], call)
        for ordered, kernel in product((False, True), backward_variants((dim, dim), "bf16", False)):
            backward.backward_variants = lambda *_, kernel=kernel: [kernel]
            call = AttentionCall(SliceTable(ROWS), 0.1, deterministic=ordered)
            BACKEND.backward(x.dout, *x[:3], out, lse, x.dlse, call)
        lists = random_lists(330, 1, 300, 130, device="cuda")
        for least_tiles in (0, 4):
            index_lists.LEAST_TILES = least_tiles
            out, lse, _ = BACKEND.forward_indices(*x[:3], IndexCall(lists, 0.1))
            for ordered in (False, True):
                call = IndexCall(lists, 0.1, deterministic=ordered)
                BACKEND.backward_indices(x.dout, *x[:3], out, lse, x.dlse, call)
    torch.cuda.synchronize()
    print("launched")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dims", nargs="+", type=int)
    parser.add_argument("--cubins", type=Path, help="launch kernels from here")
    options = parser.parse_args()
    for module in (forward, backward, index, index_backward, index_lists) if options.cubins else ():
        module.CUBINS = options.cubins
    main(options.dims)
