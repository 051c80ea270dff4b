# SPDX-License-Identifier: Apache-2.0
"""The programs of examples/ run, on one process and under torchrun, with the same numbers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def numbers_printed(command):
    line = next(line for line in output_of(command).splitlines() if "norm" in line)
    return [float(number) for number in re.findall(r"\d+\.\d+", line)]


def output_of(command):
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "name", ["quickstart.py", "second_mask.py", "cross_attention.py", "encoder_decoder.py", "fsdp2.py"]
)
def test_example_gives_the_same_on_one_process_and_on_two(name):
    alone = numbers_printed([str(EXAMPLES / name)])
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    together = numbers_printed([*torchrun, str(EXAMPLES / name)])
    assert len(alone) == 2
    assert together == pytest.approx(alone, rel=1e-4)


def test_sparse_all_to_all_combines_what_experts_compute():
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    # Ranks may print between the text and the end of another's line.
    printed = output_of([*torchrun, str(EXAMPLES / "sparse_all_to_all.py")])
    errors = re.findall(r"largest error (\d\.\de[+-]\d+)", printed)
    assert len(errors) == 3
    assert max(map(float, errors)) < 1e-4


def test_an_indexer_learns_which_keys_count():
    output = output_of([str(EXAMPLES / "index_attention.py")])
    (first, *_), (last, indexer, even) = [
        [float(x) for x in re.findall(r"\d+\.\d+", line)] for line in output.splitlines()
    ]
    assert last < 0.9 * first
    assert indexer < 0.9 * even
