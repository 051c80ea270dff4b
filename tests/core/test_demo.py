# SPDX-License-Identifier: Apache-2.0
"""`magi demo` as a user runs it, its verdict, and what it says about bad input."""

import math
import os
import subprocess
import sys

import matplotlib.image
import pytest
import torch
from torch.multiprocessing import ProcessRaisedException
from typer.testing import CliRunner

import magi_attention.cli as cli
import magi_attention.cli.main as main
from magi_attention.cli.demo.command import fit_to_device
from magi_attention.cli.demo.launch import train_on_ranks
from magi_attention.cli.demo.options import DemoOptions, Device, Precision
from magi_attention.cli.demo.report import Comparison, verdict
from magi_attention.cli.demo.train import StepResult
from magi_attention.cli.devices import choose_device
from magi_attention.cli.main import app


def test_two_steps_on_two_processes_agree(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("All work and no play makes Jack a dull boy. " * 40)
    flags = ["--processes", "2", "--steps", "2", "--tokens", "511", "--layers", "1", "--dim", "64", "--device", "cpu"]
    demo = [sys.executable, "-m", "magi_attention.cli", "demo"]
    command = [*demo, *flags, "--out", str(tmp_path / "plan.png"), str(text)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "losses of both runs agree at every step" in " ".join(done.stdout.split())
    assert "kernel backend reference" in " ".join(done.stdout.split())
    assert matplotlib.image.imread(tmp_path / "plan.png").shape[2] == 4


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--processes", "0"], "--processes must be at least 1"),
        (["--tokens", "20"], "--tokens 20 is too few for 4 processes"),
        (["--heads", "3"], "--heads 3 must be a multiple of --kv-heads 2"),
        (["--dim", "40"], "--dim 40 must be a multiple of 8 * heads = 32"),
        (["--overlap-degree", "-1"], "--overlap-degree must be 0 or more"),
        (["--seed", str(2**63)], "--seed must be less than 2**63"),
        (["--out", "plan.gif"], "must end in one of .png"),
        (["--out", "nowhere/plan.png"], "make it first"),
        (["--out", "/proc/plan.png"], "/proc/plan.png can't be written"),
        (["--backend", "nonsense"], "no kernel backend 'nonsense'"),
        (["--backend", "nonsense", "--heads", "6"], "no kernel backend 'nonsense'"),
        (["--mask", "block-causal", "--tokens", "256"], "more --tokens"),
    ],
)
def test_bad_flags_are_told_before_anything_runs(flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["demo", *flags])
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_device_needs_a_gpu_for_each_process():
    assert choose_device(Device.AUTO, 4, 3) == "cpu"
    assert choose_device(Device.AUTO, 4, 4) == "cuda"
    assert choose_device(Device.CPU, 1, 8) == "cpu"
    with pytest.raises(ValueError, match="take --processes 3 or --device cpu"):
        choose_device(Device.CUDA, 4, 3)
    with pytest.raises(ValueError, match="take --device cpu"):
        choose_device(Device.CUDA, 4, 0)


def steps(*losses):
    return [StepResult(loss, 0.0, 0.0) for loss in losses]


def test_losses_that_differ_or_are_no_numbers_disagree():
    comparison = Comparison(steps(4.0, 2.0, 2.0, math.nan), steps(4.0, 2.0 + 1e-5, 2.0 + 1e-4, math.nan), 1e-5)
    assert comparison.disagreeing_steps == [3, 4]
    assert "2 of 4 steps; first at step 3, by 5.0e-05" in verdict(comparison)


def test_rounding_may_grow_as_training_goes_on():
    differences = {11: 2e-5, 20: 0.9e-5, 30: 0.9e-4, 40: 0.9e-3, 41: 2e-3, 60: 0.9e-2, 5000: 2e-2}
    losses = [1.0 + differences.get(step, 0) for step in range(1, 5001)]
    assert Comparison(steps(*[1.0] * 5000), steps(*losses), 1e-5).disagreeing_steps == [11, 41, 5000]


def test_a_disagreement_is_the_exit_code(tmp_path, monkeypatch):
    def train_badly(documents, options, device, on_step):
        for _ in range(options.steps):
            on_step(StepResult(1.0, 0.0, 0.0))
        return plans

    from magi_attention.cli.demo import command

    single_process_train = command.train
    plans = []

    def train_and_keep_the_plan(*arguments):
        plans.append(single_process_train(*arguments))

    monkeypatch.setattr(command, "train", train_and_keep_the_plan)
    monkeypatch.setattr(command, "train_on_ranks", train_badly)
    flags = ["-p", "1", "--steps", "1", "--tokens", "256", "--layers", "1", "--dim", "32", "--device", "cpu"]
    result = CliRunner().invoke(app, ["demo", *flags, "--out", str(tmp_path / "plan.png")])
    assert result.exit_code == 1
    assert "The losses differ by more than 1e-05" in result.stdout


def test_on_gpus_what_is_left_open_is_what_fast_kernels_compute(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    options = DemoOptions(processes=2, heads=6, dim=144)
    fitted = fit_to_device(options, any_precision=True, any_dim=True)
    assert (fitted.device, fitted.precision, fitted.dim) == (Device.CUDA, Precision.BF16, 6 * 64)
    asked = fit_to_device(options, any_precision=False, any_dim=False)
    assert (asked.device, asked.precision, asked.dim) == (Device.CUDA, options.precision, options.dim)
    on_cpu = fit_to_device(DemoOptions(processes=4), any_precision=True, any_dim=True)
    assert (on_cpu.device, on_cpu.precision, on_cpu.dim) == (Device.CPU, Precision.FP32, 128)
    with pytest.raises(ValueError, match="take --processes 2"):
        fit_to_device(DemoOptions(processes=4, device=Device.CUDA), any_precision=True, any_dim=True)


def test_a_rank_that_fails_ends_the_run_with_its_traceback():
    options = DemoOptions(processes=2, steps=1, tokens=64)
    with pytest.raises(ProcessRaisedException, match="nothing to predict in 64 tokens"):
        train_on_ranks([b"x"], options, "cpu", lambda result: None)


def test_a_rank_that_dies_at_its_start_is_not_waited_for():
    code = """
from multiprocessing import resource_tracker, spawn
from torch.multiprocessing import ProcessExitedException
from magi_attention.cli.demo.launch import train_on_ranks
from magi_attention.cli.demo.options import DemoOptions
resource_tracker.ensure_running()  # the same executable would be started for it
spawn.set_executable("/bin/false")
try:
    train_on_ranks([bytes(1 << 20)], DemoOptions(processes=1), "cpu", print)
except ProcessExitedException as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "process 0 terminated with exit code 1\n", done.stderr


def test_missing_libraries_are_named_with_their_remedy(monkeypatch):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "rich" else object())
    with pytest.raises(SystemExit, match=r'missing rich; run: pip install "magi-attention\[cli\]"'):
        cli.run()


@pytest.mark.parametrize(
    ("environment", "output"),
    [({}, "/dev/full"), ({"PYTHONIOENCODING": "ascii"}, os.devnull)],
    ids=["full disk", "ascii terminal"],
)
def test_an_output_that_takes_nothing_or_not_all_characters(environment, output):
    plan = [sys.executable, "-m", "magi_attention.cli", "plan", "--mask", "causal", "--tokens", "300"]
    with open(output, "w") as stdout:
        done = subprocess.run(plan, stdout=stdout, stderr=subprocess.PIPE, text=True, env=os.environ | environment)
    is_full = output == "/dev/full"
    assert done.returncode == is_full
    assert done.stderr == ("magi: [Errno 28] No space left on device\n" if is_full else "")


@pytest.mark.parametrize(
    ("error", "line"),
    [(MemoryError("Unable to allocate 29.8 GiB"), "Unable to allocate 29.8 GiB"), (MemoryError(), "MemoryError")],
    ids=str,
)
def test_too_little_memory_is_told_in_a_line(error, line, monkeypatch):
    def app():
        raise error

    monkeypatch.setattr(main, "app", app)
    with pytest.raises(SystemExit, match=f"^magi: {line}$"):
        cli.run()


def test_defaults_are_valid():
    assert DemoOptions().processes == 4
