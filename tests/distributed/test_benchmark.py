# SPDX-License-Identifier: Apache-2.0
"""``benchmarks/distributed.py``: its baselines against the oracle, and the script at toy sizes on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.context_parallel import AllGather, Kernel, Ring, SingleDevice, restrict, runs_of

from magi_attention.common.slices import SliceTable
from magi_attention.testing.distributed import RankPool
from magi_attention.testing.masks import MASK_FAMILIES
from magi_attention.testing.oracle import dense_attention, dense_mask

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "distributed.py"
HOST_TIME = SCRIPT.with_name("host_time.py")
TOTAL = 96


@pytest.fixture(scope="module")
def pool():
    with RankPool(3) as pool:
        yield pool


def inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(TOTAL, h, 8, generator=generator, dtype=torch.float64) for h in (4, 2, 2, 4)]


def run_method(rank: int, world_size: int, name: str, slices: SliceTable) -> list[torch.Tensor]:
    q, k, v, dout = inputs()
    kernel = Kernel(q, k, v, "reference")
    method = Ring(kernel, slices, TOTAL) if name == "ring" else AllGather(kernel, slices, TOTAL, name)
    assert sum(stop - start for start, stop in method.runs) == TOTAL // world_size
    q, k, v, dout = (torch.cat([x[start:stop] for start, stop in method.runs]) for x in (q, k, v, dout))
    saved = method.forward(q, k, v)
    return [saved.result.out, *method.backward(dout, saved)]


@pytest.mark.parametrize("name", ["contiguous", "zigzag", "ring"])
@pytest.mark.parametrize("family", ["causal", "varlen_causal"])
def test_baselines_are_right(pool, name, family):
    slices = MASK_FAMILIES[family](TOTAL, np.random.default_rng(0))
    results = pool.run(run_method, name, slices)
    q, k, v, dout = inputs()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = dense_attention(*leaves, slices)[0]
    expected = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
    tolerance = 1e-10 if name != "ring" else 1e-5  # its gradients travel in float32
    for rank, tensors in enumerate(results):
        runs = runs_of(rank, 3, TOTAL, "contiguous" if name == "contiguous" else "zigzag")
        for actual, whole in zip(tensors, expected, strict=True):
            mine = torch.cat([whole[start:stop] for start, stop in runs])
            torch.testing.assert_close(actual, mine, rtol=tolerance, atol=tolerance)


def test_the_kernel_alone():
    q, k, v, dout = inputs()
    alone = SingleDevice(Kernel(q, k, v, "reference"), SliceTable([[0, TOTAL, 0, TOTAL, 1]]))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = dense_attention(*leaves, alone.slices)[0]
    saved = alone.forward(q, k, v)
    torch.testing.assert_close(saved.result.out, out.detach())
    for actual, expected in zip(alone.backward(dout, saved), torch.autograd.grad(out, leaves, dout), strict=True):
        torch.testing.assert_close(actual, expected)


def test_restricted_masks_are_exact():
    slices = MASK_FAMILIES["random_tiling"](TOTAL, np.random.default_rng(4))
    whole = dense_mask(slices, TOTAL, TOTAL, torch.device("cpu"))
    queries, keys = runs_of(1, 3, TOTAL, "zigzag"), [*runs_of(2, 3, TOTAL, "zigzag"), *runs_of(0, 3, TOTAL, "zigzag")]
    rows, columns = (torch.cat([torch.arange(*run) for run in runs]) for runs in (queries, keys))
    part = restrict(slices, queries, keys)
    assert torch.equal(dense_mask(part, len(rows), len(columns), torch.device("cpu")), whole[rows][:, columns])


def test_the_script_at_toy_sizes(tmp_path):
    figures = tmp_path / "figures.json"
    arguments = "--device cpu --gpus 1 2 --tokens 256 --heads 2 1 --head-dim 16 --precision fp32 --repeat 4 --warmup 0"
    command = [sys.executable, str(SCRIPT), *arguments.split(), "--masks", "causal", "--overlap-degree", "0", "1"]
    command += ["--seconds", "0", "--host-time", "--breakdown", "--json", str(figures)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stderr
    cells = json.loads(figures.read_text())["cells"]
    measured = {(cell["ranks"], cell["method"]) for cell in cells if "forward_tflops" in cell}
    ours = {"single", "magi/0", "magi/1"}
    both = {(size, name) for size in (1, 2) for name in ours}
    assert measured >= both | {(2, name) for name in ("gather", "gather-zz", "ring-zz")}
    # Two cycles at least, which differ.
    assert all(cell["forward_error"] > 0 for cell in cells if "forward_tflops" in cell)
    # The ring of torch knows GPU kernels alone; that one method fails doesn't end the run.
    assert [cell["method"] for cell in cells if "error" in cell] in ([], ["torch"])
    assert run.stdout.count("causal") >= 4
    assert run.stdout.count("host") == 4


@pytest.mark.gpu(2)
def test_equal_clocks_over_nccl(tmp_path):
    pytest.importorskip("triton")
    figures = tmp_path / "figures.json"
    arguments = "--gpus 2 --tokens 2048 --heads 4 2 --masks causal --methods magi gather --repeat 4 --equal-clocks"
    command = [sys.executable, str(SCRIPT), *arguments.split(), "--seconds", "0", "--json", str(figures)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count(" cycles ") == 2
    cells = json.loads(figures.read_text())["cells"]
    assert [cell["method"] for cell in cells] == ["single", "magi/1", "gather"]
    assert all(0 < cell["forward"] < 1 for cell in cells)
    # Clocks change by some percent, and passes are of some tenths of a millisecond.
    assert all(0.5 < cell["at_equal_clocks"]["forward"] / cell["forward"] < 2 for cell in cells)


def test_equal_clocks_need_gpus():
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--equal-clocks"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 1
    assert run.stderr.startswith("--equal-clocks reads the clocks of GPUs")


def test_host_time_at_toy_sizes():
    command = [sys.executable, str(HOST_TIME), "--ranks", "2", "--masks", "causal", "--repeat", "4", "--every-rank"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    for method in ("gather", "magi/0", "magi/1", "magi/1 kept", "magi/2"):
        lines = [line for line in run.stdout.splitlines() if line[34:48].strip() == method]
        assert [line.split()[0] for line in lines] == ["0/2", "1/2", "all/2"], run.stdout
