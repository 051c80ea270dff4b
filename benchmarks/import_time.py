# SPDX-License-Identifier: Apache-2.0
"""How long does importing the package take beyond importing torch? The goal is under 0.3 s."""

import subprocess
import sys

MODULES = ("magi_attention", "magi_attention.api", "magi_attention.functional")
RUNS = 7
MEASURE = """
import importlib, sys, time
import torch
start = time.perf_counter()
importlib.import_module(sys.argv[1])
print(time.perf_counter() - start)
"""


def import_seconds(module: str) -> float:
    """Return the seconds that a fresh interpreter with torch takes to import ``module``."""
    return float(subprocess.check_output([sys.executable, "-c", MEASURE, module], text=True))


def main() -> None:
    """Print the shortest of several imports for each module."""
    print("| module | import beyond torch, ms |\n|---|---|")
    for module in MODULES:
        print(f"| {module} | {1000 * min(import_seconds(module) for _ in range(RUNS)):.0f} |")


if __name__ == "__main__":
    main()
