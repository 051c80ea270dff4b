# SPDX-License-Identifier: Apache-2.0
"""The kernels on one GPU, by themselves and under NVIDIA's compute-sanitizer."""

import shutil
import subprocess
import sys

import pytest


@pytest.mark.gpu(1)
def test_kernels_are_right():
    from tests.comm.alone import main

    main()


@pytest.mark.gpu(1)
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_kernels_are_clean(tool):
    command = [
        "compute-sanitizer",
        "--tool",
        tool,
        "--report-api-errors",
        "no",
        "--error-exitcode",
        "3",
        "--kernel-name",
        "kernel_substring=push",
    ]
    command += ["--kernel-name", "kernel_substring=add_", "--kernel-name", "kernel_substring=merge_"]
    done = subprocess.run(
        [*command, sys.executable, "-m", "tests.comm.alone"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "all kernels are right" in done.stdout
