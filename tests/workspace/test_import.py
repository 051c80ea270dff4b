# SPDX-License-Identifier: Apache-2.0
"""Importing the core is silent, needs no GPU, and loads nothing that only some callers want."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

OPTIONAL = (
    "IPython",
    "hypothesis",
    "magi_comm_grpcoll",
    "magi_kernels_blackwell",
    "magi_kernels_hopper",
    "matplotlib",
    "pytest",
    "rich",
    "sympy",
    "torch._dynamo",
    "torch._inductor",
    "torch.nn.attention.flex_attention",
    "triton",
    "typer",
)

IMPORT = """
import importlib, json, logging, pathlib, sys, warnings
import numpy, torch

before = set(sys.modules)
handlers = list(logging.root.handlers)
warnings.simplefilter("error")
importlib.import_module(sys.argv[1])
pathlib.Path(sys.argv[2]).write_text(json.dumps({
    "modules": sorted(set(sys.modules) - before),
    "cuda": torch.cuda.is_initialized(),
    "logging": logging.root.handlers != handlers,
}))
"""


@pytest.mark.parametrize("module", ["magi_attention", "magi_attention.api", "magi_attention.functional"])
def test_import_is_silent_and_light(module: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    run = subprocess.run([sys.executable, "-c", IMPORT, module, str(report)], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    found = json.loads(report.read_text())
    assert module in found["modules"]
    assert not [
        name for name in found["modules"] if name in OPTIONAL or name.startswith(tuple(f"{o}." for o in OPTIONAL))
    ]
    assert not found["cuda"]
    assert not found["logging"]
