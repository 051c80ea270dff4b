# SPDX-License-Identifier: Apache-2.0
"""What ``benchmarks/kernels.py`` says of its bars, on made-up figures."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.kernel_bars import bars, hopper_bars, summary

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernels.py"


def cell(contender: str, forward: float, backward: float, mask: str = "causal", tokens: int = 32768):
    return {"mask": mask, "tokens": tokens, "contender": contender, "forward": forward, "backward": backward}


def compared(row, sdpa_causal=None):
    return {(bar.peer, bar.direction): (round(bar.ratio, 3), bar.holds) for bar in bars(row, sdpa_causal)}


def test_dense_masks_are_held_against_flash_attention_4_and_the_original():
    sdpa = cell("cudnn-sdpa", 616 * 1.1, 518 * 1.1)
    row = [cell("auto", 650, 582.0), cell("fa4-native", 670, 600), cell("cudnn_flex", 1, 1), sdpa]
    assert compared(row, sdpa) == {
        ("fa4-native", "forward"): (0.97, True),
        ("fa4-native", "backward"): (0.97, True),
        ("original", "forward"): (round(650 / 618 / 1.1, 3), False),
        ("original", "backward"): (round(582 / 544 / 1.1, 3), False),
    }


def test_windows_are_held_against_cudnn_flex_backward_alone():
    row = [cell("auto", 9, 104, "swa_causal_1024"), cell("cudnn_flex", 10, 100, "swa_causal_1024")]
    assert compared(row) == {("cudnn_flex", "backward"): (1.04, False)}


def test_what_was_not_measured_or_has_no_bar_is_left_out():
    missing = {"mask": "causal", "tokens": 32768, "contender": "auto"}
    assert not compared([missing, cell("fa4-native", 1, 1)])
    assert not compared([cell("auto", 1, 1, tokens=4096), cell("fa4-native", 1, 1, tokens=4096)], cell("x", 1, 1))
    (bar,) = bars(
        [cell("auto", 1, 1, "varlen_causal") | {"forward": 2}, cell("cudnn_flex", 1, 2, "varlen_causal")], None
    )
    assert str(bar) == "varlen_causal 32768 backward: 0.500 of cudnn_flex, 1.05 MISSED"


def test_the_summary_names_the_closest_comparison_of_each_peer():
    row = [cell("auto", 650, 582.0), cell("fa4-native", 600, 610)]
    found = [
        *bars(row, None),
        *bars([cell("auto", 1, 104, "varlen_causal"), cell("cudnn_flex", 1, 104 / 1.06, "varlen_causal")], None),
    ]
    assert list(summary(found)) == [
        "MISSED: at least 0.97 of fa4-native: 1 of 2, least 0.954 (causal 32768 backward)",
        "HOLDS: at least 1.05 of cudnn_flex: 1 of 1, least 1.060 (varlen_causal 32768 backward)",
    ]


def test_hopper_is_held_against_the_best_peer_of_each_mask():
    row = [cell("hopper", 112, 100, "varlen_full"), cell("cudnn_flex", 90, 95, "varlen_full")]
    row += [cell("blackwell", 100, 80, "varlen_full"), cell("auto", 112, 100, "varlen_full")]
    found = list(hopper_bars(row))
    assert [str(bar) for bar in found] == [
        "hopper varlen_full 32768 forward: 1.120 of best peer blackwell, 1.1 holds",
        "hopper varlen_full 32768 backward: 1.053 of best peer cudnn_flex, 1.1 MISSED",
    ]
    assert list(summary(found)) == [
        "MISSED: hopper at least 1.1 of best peer: 1 of 2, least 1.053 (varlen_full 32768 backward)"
    ]
    dense = list(hopper_bars([cell("hopper", 95, 92), cell("fa4-native", 100, 100)]))
    assert [bar.needed for bar in dense] == [0.95, 0.92]
    assert all(bar.holds for bar in dense)
    blocks = [cell("hopper", 130, 120, "blocks_5"), cell("cudnn_flex", 100, 100, "blocks_5")]
    blocks += [cell("flex-attention", 110, 50, "blocks_5")]
    found = [("cudnn_flex", True), ("flex-attention", False), ("cudnn_flex", False), ("flex-attention", True)]
    assert [(bar.peer, bar.holds) for bar in hopper_bars(blocks)] == found


def test_tables_show_what_is_missing(tmp_path):
    chosen = {"mask": "blocks_5", "tokens": 32768, "contender": "auto", "forward": 650.0}  # its backward not measured
    failed = {"mask": "blocks_5", "tokens": 32768, "contender": "flex-attention", "error": "OutOfMemoryError"}
    file = tmp_path / "cells.json"
    file.write_text(json.dumps({"where": "a GPU", "cells": [cell("hopper", 655, 500, "blocks_5"), chosen, failed]}))
    printed = subprocess.run([sys.executable, SCRIPT, "--read", file], capture_output=True, text=True, check=True)
    assert "655 / 500        650 / –" in printed.stdout
    assert "flex-attention: OutOfMemoryError" in printed.stdout
