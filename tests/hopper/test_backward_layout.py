# SPDX-License-Identifier: Apache-2.0
"""Where accumulators of the gradients of queries belong, compiled for the host."""

import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from magi_kernels_hopper.variants import BACKWARD_SIZES, BackwardVariant

PLAIN = [BackwardVariant(*dims, "bf16") for dims in BACKWARD_SIZES]
CSRC = Path(__file__).parents[2] / "packages" / "kernels-hopper" / "csrc"
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    program = tmp_path_factory.mktemp("backward") / "backward"
    source = Path(__file__).with_name("backward_main.cpp")
    subprocess.run([COMPILER, "-std=c++17", "-O1", f"-I{CSRC}", "-x", "c++", source, "-o", program], check=True)
    found = defaultdict(list)
    for line in subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines():
        head_dim, *rest = map(int, line.split())
        found[head_dim].append(rest)
    return found


@pytest.mark.parametrize("variant", PLAIN, ids=lambda variant: variant.name)
def test_every_gradient_has_its_place(places, variant):
    rows, columns, parts = variant.sizes.tile_m, variant.head_dim, variant.sizes.dq_parts
    found = places[variant.head_dim]
    assert len(found) == rows * columns
    for part in range(parts):  # a block of columns, which is how it is written
        first, end = columns * part // parts, columns * (part + 1) // parts
        own = {(row, column) for which, _, _, row, column in found if which == part}
        assert own == {(row, column) for row in range(rows) for column in range(first, end)}


def test_half_panels(places):
    """Of three panels of 64 columns, one product takes a whole one and another half of the one in the middle."""
    for part, _, i, _, column in places[192]:
        assert column // 64 == (2 * part if i < 32 else 1)
        if i >= 32:
            assert (column - 64) // 32 == part
