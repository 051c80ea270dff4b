# SPDX-License-Identifier: Apache-2.0
"""The index functions that kernels and host share, compiled for the host and compared with the PTX manual's words."""

import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "packages" / "kernels-hopper" / "csrc"
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    program = tmp_path_factory.mktemp("layout") / "layout"
    source = Path(__file__).with_name("layout_main.cpp")
    subprocess.run([COMPILER, "-std=c++17", "-O1", f"-I{CSRC}", "-x", "c++", source, "-o", program], check=True)
    lines = defaultdict(list)
    for line in subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines():
        name, *words = line.split()
        lines[name].append(words)
    return lines


@pytest.mark.parametrize(
    ("name", "rows", "columns", "width"), [("swizzle128", 64, 128, 128), ("swizzle64", 40, 96, 64)]
)
def test_swizzle(printed, name, rows, columns, width):
    """Chunk c of 16 bytes of row r of a panel lies at chunk c xor (r mod 8), or c xor (r / 2 mod 4) for 64 bytes."""
    seen = set()
    for row, column, offset in (map(int, words) for words in printed[name]):
        panel, within = divmod(column, width // 2)
        chunk, byte = divmod(2 * within, 16)
        permuted = chunk ^ (row % 8 if width == 128 else row // 2 % 4)
        assert offset == panel * rows * width + row * width + permuted * 16 + byte
        seen.add(offset)
    assert seen == set(range(0, 2 * rows * columns, 2))


def test_accumulators(printed):
    """Each warp has 16 rows; lanes go through 8 rows in steps of 4, with 2 columns each."""
    places = set()
    for thread, i, row, column in (map(int, words) for words in printed["accumulator"]):
        warp, lane = divmod(thread, 32)
        assert row == 16 * warp + lane // 4 + (8 if i & 2 else 0)
        assert column == 8 * (i // 4) + 2 * (lane % 4) + (i & 1)
        places.add((row, column))
    assert len(places) == 64 * 128


def test_columns_of_sums(printed):
    """Where a thread puts four accumulators of a row, the columns are theirs."""
    column_of = {int(place): int(column) for place, column in printed["column_of"]}
    columns = {(thread, i): column for thread, i, _, column in (map(int, w) for w in printed["accumulator"])}
    for thread in range(4):
        for i in (*range(0, 48, 8), *range(2, 48, 8)):
            place = i // 8 * 16 + thread * 4
            assert [column_of[place + j] for j in range(4)] == [columns[thread, i + j] for j in (0, 1, 4, 5)]
    assert sorted(column_of.values()) == list(range(96))


def test_columns_before(printed):
    """Counts a thread's columns of one row, of 128, that lie before a column, once clamped."""
    for thread, column, before in (map(int, words) for words in printed["before"]):
        own = [8 * j + 2 * (thread % 4) + e for j in range(16) for e in range(2)]
        assert min(max(before, 0), 32) == sum(each < column for each in own)


def test_descriptors(printed):
    """Start, leading and stride byte offset in units of 16 bytes, and the swizzle."""
    panel = 128 * 128
    assert int(printed["k_major"][0][1], 16) == fields(0x8400 + panel + 64 * 128 + 32, 16, 1024, 1)
    assert int(printed["mn_major"][0][1], 16) == fields(0x8400 + panel + 16 * 128, panel, 1024, 1)
    panel = 128 * 64
    assert int(printed["k_major_64"][0][1], 16) == fields(0x8400 + panel + 64 * 64 + 32, 16, 512, 2)
    assert int(printed["mn_major_64"][0][1], 16) == fields(0x8400 + panel + 16 * 64, panel, 512, 2)


def fields(start: int, leading: int, stride: int, swizzle: int) -> int:
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | swizzle << 62
