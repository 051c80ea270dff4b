# SPDX-License-Identifier: Apache-2.0
"""`magi precompile` with a backend that pretends to compile, found by its entry point in the compiling processes."""

import os
import subprocess
import sys
import time
from importlib.metadata import entry_points
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from magi_attention.cli.main import app
from magi_attention.cli.precompile.options import read_selections
from magi_attention.cli.precompile.worker import Task, compile_all, compile_one, find_tasks, without_kernels
from magi_attention.kernels import registry
from magi_attention.kernels.protocol import KernelSelection, PrecompileCase, Precompiles
from magi_attention.kernels.reference import BACKEND as REFERENCE

SOURCE = """
import os
import time
import warnings
from itertools import product
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from magi_attention.env.build import ffa_fa4_cache_dir
from magi_attention.kernels.protocol import PrecompileCase
from magi_attention.kernels.reference import ReferenceBackend


class PretendingBackend(ReferenceBackend):
    def precompile_cases(self, selection):
        combinations = product(selection.dtypes, selection.heads, selection.head_dims, selection.directions)
        return [
            PrecompileCase(selection.arch, dtype, *heads, *dims, direction, variant)
            for dtype, heads, dims, direction in combinations
            if dims != (96, 96)
            for variant in ("", "softcap")
        ]

    def precompile(self, case):
        print("talking compiler")
        warnings.warn("talking compiler")
        with FakeTensorMode():
            torch.empty(1).data_ptr()  # which PyTorch's C++ code warns of
        if case.head_dim == 256:
            raise RuntimeError("no registers left [sad]")
        if case.head_dim == 512:
            os._exit(1)
        path = ffa_fa4_cache_dir() / str(case).replace("/", "-")
        if case.head_dim == 1024:
            path.with_suffix(".begun").write_text(str(os.getpid()))
            time.sleep(100)
        cached = path.exists()
        path.write_text(str(os.getpid()))
        return not cached


BACKEND = PretendingBackend()
"""


@pytest.fixture
def pretending(tmp_path, monkeypatch):
    """Install the backend for this process and its children; returns the cache's folder."""
    code, cache = tmp_path / "code", tmp_path / "cache"
    cache.mkdir()
    # Of several distributions of one name, the first on the path counts: these have none of the installed backends.
    installed = {point.dist.name for point in entry_points(group="magi_attention.kernels") if point.dist}
    for name in {"pretending", *installed} - {"magi-attention"}:
        info = code / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (code / "pretending.py").write_text(SOURCE)
    (code / "pretending-1.0.dist-info" / "entry_points.txt").write_text(
        "[magi_attention.kernels]\npretending = pretending:BACKEND\n"
    )
    monkeypatch.syspath_prepend(str(code))
    monkeypatch.setenv("MAGI_ATTENTION_FFA_FA4_CACHE_DIR", str(cache))
    registry.installed_backends.cache_clear()
    yield cache
    registry.installed_backends.cache_clear()


def run(*flags):
    return CliRunner().invoke(app, ["precompile", *map(str, flags)], env={"COLUMNS": "160"})


def words(result):
    return [line.replace("│", " ").split() for line in result.stdout.splitlines()]


def test_selections():
    read = read_selections(["sm_90", "sm_100", "sm_90"], ["bf16", "fp16"], ["8", "8/2"], ["64", "192/128"], "backward")
    assert [each.arch for each in read] == ["sm_90", "sm_100"]
    assert read[0] == KernelSelection(
        "sm_90", (torch.bfloat16, torch.float16), ((8, 8), (8, 2)), ((64, 64), (192, 128)), ("backward",)
    )
    assert [each.multiprocessors for each in (*read, *read_selections(["sm_100"], [], [], [], "both", 152))] == [
        None,
        None,
        152,
    ]
    assert read_selections(["sm_90"], [], [], [], "both") == [
        KernelSelection(
            "sm_90", (torch.bfloat16,), ((32, 32), (32, 8)), ((64, 64), (128, 128)), ("forward", "backward")
        )
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arch", "90"], "--arch must be like sm_90"),
        (["--dtype", "fp8"], "--dtype must be one of bf16"),
        (["--heads", "8/3"], "multiple of the key/value heads"),
        (["--heads", "0/0"], "--heads must be a number or two"),
        (["--head-dim", "64x64"], "--head-dim must be a number or two"),
        (["--direction", "sideways"], "--direction must be"),
        (["--backend", "flex"], "'flex' compiles nothing ahead of time; those that do: pretending"),
        (["--head-dim", "96"], "nothing to compile"),
    ],
)
def test_what_makes_no_sense_is_refused(pretending, flags, message):
    result = run(*(() if "--arch" in flags else ("--arch", "sm_90")), *flags)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU names the architecture")
def test_without_a_gpu_the_architecture_must_be_named(pretending):
    result = run()
    assert result.exit_code == 2
    assert "--arch sm_90" in result.stderr


def test_without_a_backend_that_can(monkeypatch):
    monkeypatch.setattr("magi_attention.cli.precompile.worker.installed_backends", lambda: {"reference": REFERENCE})
    assert not isinstance(REFERENCE, Precompiles)
    with pytest.raises(ValueError, match="no installed kernel backend compiles ahead of time"):
        find_tasks([], [])


def test_compiling_caching_and_failing(pretending, capfd):
    flags = ("--arch", "sm_90", "--arch", "sm_100", "--head-dim", 64, "--heads", "4/2", "--jobs", 1)
    first = run(*flags, "--direction", "forward")
    assert first.exit_code == 0, first.output
    assert ["pretending", "sm_90", "2", "0", "0"] in [line[:5] for line in words(first)]
    assert ["pretending", "sm_100", "2", "0", "0"] in [line[:5] for line in words(first)]
    assert "talking" not in first.output
    printed = "".join(capfd.readouterr())
    assert "talking" not in printed
    assert "FakeTensor" not in printed
    assert str(pretending) in first.stdout.replace("\n", "")
    names = {path.name for path in pretending.iterdir()}
    assert "sm_100 bfloat16 4-2 heads dim 64 forward softcap" in names
    # A process compiles for one architecture only.
    workers = {arch: {path.read_text() for path in pretending.glob(f"{arch} *")} for arch in ("sm_90", "sm_100")}
    assert not workers["sm_90"] & workers["sm_100"]
    second = run("--arch", "sm_90", "--heads", "4/2", "--jobs", 1, "--head-dim", 64, "--head-dim", 256)
    assert second.exit_code == 1
    assert ["pretending", "sm_90", "2", "2", "4"] in [line[:5] for line in words(second)]
    lines = second.stdout.splitlines()
    assert lines.count("failed RuntimeError: no registers left [sad]") == 1
    assert "  pretending, sm_90 bfloat16 4/2 heads dim 256 backward softcap" in lines
    assert str(pretending) in second.stdout.replace("\n", "")


def test_a_compiler_that_dies(pretending):
    result = run("--arch", "sm_90", "--heads", "4/2", "--jobs", 1, "--head-dim", 512, "--direction", "forward")
    assert result.exit_code == 1
    assert "a compiling process died, maybe for lack of memory" in " ".join(result.stdout.split())
    assert "are kept" not in result.stdout


def test_logs_show_every_case_as_it_finishes(pretending):
    result = run("--arch", "sm_90", "--heads", "4/2", "--head-dim", 64, "--head-dim", 256, "--jobs", 1)
    told = [line.rpartition(", ")[0].split(" ", 1) for line in result.stdout.splitlines() if line[1:3] == "/8"]
    assert [number for number, _ in told] == [f"{count}/8" for count in range(1, 9)]
    assert "compiled pretending, sm_90 bfloat16 4/2 heads dim 64 backward softcap" in [text for _, text in told]
    assert "failed pretending, sm_90 bfloat16 4/2 heads dim 256 forward" in [text for _, text in told]


def test_who_stops_early_waits_for_no_compiler(pretending):
    selections = read_selections(["sm_90"], [], ["4/2"], ["64", "1024"], "forward")
    outcomes = compile_all(find_tasks(selections, []), 1)
    assert [next(outcomes).status for _ in range(2)] == ["compiled", "compiled"]
    wait_for(lambda: list(pretending.glob("*.begun")))
    outcomes.close()
    assert not active_children()
    assert len(list(pretending.iterdir())) == 3


def test_compilers_end_with_a_process_that_is_killed(pretending):
    command = [sys.executable, "-m", "magi_attention.cli", "precompile", "--arch", "sm_90", "--head-dim", "1024"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([*command, "--jobs", "1"], env=environment, stdout=subprocess.DEVNULL) as process:
        (begun,) = wait_for(lambda: [path for path in pretending.glob("*.begun") if path.read_text()])
        process.kill()
    wait_for(lambda: has_ended(int(begun.read_text())))


def wait_for(look):
    """Look until there is something."""
    for _ in range(600):
        if found := look():
            return found
        time.sleep(0.1)
    raise AssertionError("waited for a minute in vain")


def has_ended(pid):
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_the_folder_is_shown_in_full(pretending, monkeypatch):
    monkeypatch.chdir(pretending.parent)
    monkeypatch.setenv("MAGI_ATTENTION_FFA_FA4_CACHE_DIR", pretending.name)
    result = run("--arch", "sm_90", "--heads", "4/2", "--head-dim", 64, "--jobs", 1)
    assert f"Kernels are kept in {pretending}." in result.stdout


def test_what_no_backend_has_kernels_for_is_told(pretending):
    flags = ("--head-dim", 96, "--head-dim", 64, "--dtype", "fp16", "--heads", "4/2", "--direction", "forward")
    result = run("--arch", "sm_90", *flags)
    assert result.exit_code == 0
    assert result.stderr == "magi: no backend has kernels for --head-dim 96/96 on sm_90; nothing is compiled for it\n"
    assert without_kernels(read_selections(["sm_80"], [], [], [], "both"), []) == ["sm_80"]
    tasks = [Task("pretending", PrecompileCase("sm_90", torch.bfloat16, 8, 8, 64, 64, "forward"))]
    selections = read_selections(["sm_90"], ["bf16", "fp32"], ["8"], ["64"], "forward")
    assert without_kernels(selections, tasks) == ["--dtype fp32 on sm_90"]


def test_backends_that_were_asked_for_speak_for_no_others(pretending):
    flags = ("--arch", "sm_90", "--backend", "pretending", "--head-dim", 96)
    assert "magi: none of pretending supports any of these combinations" in run(*flags).stderr
    result = run(*flags, "--head-dim", 64, "--heads", "4/2", "--direction", "forward")
    assert "magi: none of pretending has kernels for --head-dim 96/96 on sm_90; " in result.stderr


def test_backends_that_cannot_be_loaded_say_why(pretending):
    (pretending.parent / "code" / "pretending.py").write_text("raise ImportError('built for another core')")
    sys.modules.pop("pretending", None)
    for flags in ((), ("--backend", "pretending")):
        result = run("--arch", "sm_90", *flags)
        assert result.exit_code == 2
        assert "built for another core" in result.stderr
        assert "pip install" not in result.stderr


def test_other_names_of_backends_will_do(monkeypatch):
    class Compiling(type(REFERENCE)):
        def precompile_cases(self, selection):
            return [PrecompileCase(selection.arch, torch.bfloat16, 8, 8, 64, 64, "forward")]

        def precompile(self, case):
            return True

    backends = {"blackwell": Compiling(), "other": Compiling()}
    monkeypatch.setattr("magi_attention.cli.precompile.worker.installed_backends", lambda: backends)
    tasks = find_tasks(read_selections(["sm_90"], [], [], [], "both"), ["fa4"])
    assert [task.backend for task in tasks] == ["blackwell"]


def test_one_case_in_this_process(pretending):
    case = PrecompileCase("sm_90", torch.float16, 8, 8, 192, 128, "backward")
    assert str(case) == "sm_90 float16 8/8 heads dim 192/128 backward"
    assert [compile_one(Task("pretending", case)).status for _ in range(2)] == ["compiled", "cached"]
