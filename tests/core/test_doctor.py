# SPDX-License-Identifier: Apache-2.0
"""`magi doctor`: what it finds on a machine without a GPU, and that it notices what is wrong."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from magi_attention.cli.doctor import command, machine
from magi_attention.cli.doctor.backends import allowed_error, capabilities, check_backends, choices
from magi_attention.cli.doctor.communication import check_communication, communication_facts, peer_access
from magi_attention.cli.doctor.findings import Capability, Check
from magi_attention.cli.doctor.machine import machine_facts, package_versions
from magi_attention.cli.doctor.requirements import check_requirements
from magi_attention.cli.doctor.settings import check_kernel_folder, check_planner, check_variables, variables_set
from magi_attention.cli.main import app
from magi_attention.env import VARIABLES
from magi_attention.kernels import registry
from magi_attention.kernels.mask_class import MASK_CLASSES
from magi_attention.kernels.protocol import AttentionRequest, AttentionResult
from magi_attention.kernels.reference import BACKEND as REFERENCE
from magi_attention.kernels.reference import ReferenceBackend
from magi_attention.kernels.registry import UnloadableBackend

CPU = torch.device("cpu")


class WrongBackend(ReferenceBackend):
    """Its output is too large, and its gradients are not numbers."""

    name = "wrong"

    def forward(self, *args):
        result = super().forward(*args)
        return AttentionResult(result.out * 1.2, result.lse, result.max_logits)

    def backward(self, *args):
        return tuple(x * torch.nan for x in super().backward(*args))


class CompilingBackend(ReferenceBackend):
    """It compiles nothing, ahead of time."""

    def precompile_cases(self, selection):
        return []

    def precompile(self, case):
        return False


@pytest.fixture
def install(monkeypatch):
    """Pretend that exactly these backends are installed."""

    def pretend(**backends):
        points = [SimpleNamespace(name=name, load=lambda b=backend: b) for name, backend in backends.items()]
        monkeypatch.setattr(registry, "entry_points", lambda group: points)
        registry.installed_backends.cache_clear()

    yield pretend
    registry.installed_backends.cache_clear()


def status_of(checks):
    return {check.name: check.status for check in checks}


def test_facts():
    assert machine_facts()["torch"] == torch.__version__
    assert {"magi-attention", "torch", "numpy"} <= set(package_versions())
    assert communication_facts()["gloo"] == "available"
    assert "alltoall" in communication_facts()["transports"]
    assert set(peer_access()) == {
        f"{i}-{j}" for i in range(torch.cuda.device_count()) for j in range(torch.cuda.device_count()) if i != j
    }


def test_what_the_reference_can_do():
    forward, backward = (each for each in capabilities(CPU) if each.backend == "reference")
    assert (forward.direction, backward.direction) == ("forward", "backward")
    assert forward.dtypes == ["bfloat16", "float16", "float32", "float64"]
    assert "192/128" in forward.head_dims
    assert forward.features == ["grouped heads", "softcap", "max_logits", "deterministic"]
    assert "max_logits" not in backward.features
    assert not forward.refusals
    assert set(forward.tflops) == set(MASK_CLASSES)


def test_refusals_are_told_with_what_was_asked_for():
    flex = next(each for each in capabilities(CPU) if each.backend == "flex")
    assert not flex.dtypes
    assert "no backward pass on a CPU" in flex.refusals["head dim 128"]


def test_a_backend_that_runs_nothing_has_one_reason():
    refusals = {"bfloat16": "no GPU", "float64": "no float64", "head dim 64": "no float64", "softcap": "no GPU"}
    nothing = Capability("fast", "forward", [], [], [], refusals, {})
    assert command._refusals([nothing]) == ["[bold]fast[/bold] forward, not anything: no GPU"]
    something = replace(nothing, dtypes=["bfloat16"])
    assert len(command._refusals([something])) == 2


def test_choices(install):
    install(reference=REFERENCE)
    both = {"forward": {"reference": 0.05}, "backward": {"reference": 0.05}}
    assert choices(CPU) == dict.fromkeys(MASK_CLASSES, both)


def test_backends_are_held_against_the_oracle(install):
    install(reference=REFERENCE, wrong=WrongBackend(), broken=UnloadableBackend("broken", ImportError("libx.so")))
    checks = {check.name: check for check in check_backends(CPU)}
    assert status_of(checks.values()) == {
        "broken": "failed",
        "reference forward": "ok",
        "reference backward": "ok",
        "wrong forward": "failed",
        "wrong backward": "failed",
    }
    assert "libx.so" in checks["broken"].detail
    assert "largest error of out" in checks["wrong forward"].detail
    assert "nan" in checks["wrong backward"].detail


@pytest.mark.parametrize(
    ("device", "dtype", "factor"),
    [("cuda", "bfloat16", 2), ("cuda", "float16", 2), ("cuda", "float32", 4), ("cpu", "float32", 2)],
)
def test_more_than_twice_plain_pytorchs_error_is_for_float32_on_gpus(device, dtype, factor):
    request = AttentionRequest(torch.device(device), getattr(torch, dtype), 4, 2, 64, 64)
    assert allowed_error(request) == factor


def test_planner_and_communication_are_well():
    assert check_planner().status == "ok"
    assert "rows travel" in check_planner().detail
    checks = status_of(check_communication())
    assert checks["gloo"] == "ok"
    assert checks["nccl"] == ("ok" if torch.cuda.is_available() else "skipped")


def test_folder_of_compiled_kernels(install, monkeypatch, tmp_path):
    install(reference=REFERENCE)
    assert check_kernel_folder().status == "skipped"
    install(compiling=CompilingBackend())
    for folder, status in ((tmp_path / "new" / "kernels", "ok"), ("/proc/nothere", "failed")):
        monkeypatch.setenv("MAGI_ATTENTION_FFA_FA4_CACHE_DIR", str(folder))
        check = check_kernel_folder()
        assert check.status == status
        assert str(folder) in check.detail
    assert "MAGI_ATTENTION_FFA_FA4_CACHE_DIR names another" in check.detail


def test_variables(monkeypatch, tmp_path):
    (tmp_path / "speeds.json").write_text('[{"backend": "flex", "tflops": 1}]')
    monkeypatch.setenv("MAGI_ATTENTION_KERNEL_SPEEDS", str(tmp_path / "speeds.json"))
    monkeypatch.setenv("MAGI_ATTENTION_PRECISION", "fp8")
    monkeypatch.setenv("MAGI_ATTENTION_CATGQA", "1")
    monkeypatch.setenv("MAGI_ATTENTION_CHECK_PLAN", "0")
    monkeypatch.setenv("MAGI_ATTENTION_DETERMINISTIC_MODE", "true")
    monkeypatch.setenv("MAGI_ATTENTION_KERNEL_BACKENDS", "flex")
    found = variables_set()
    assert found["MAGI_ATTENTION_CATGQA"]["meaning"].startswith("ignored: ")
    checks = {check.name: check for check in check_variables()}
    assert status_of(checks[name] for name in checks if "MAGI" in name or name == "configuration") == {
        "MAGI_ATTENTION_CATGQA": "ok",
        "MAGI_ATTENTION_CHECK_PLAN": "ok",
        "MAGI_ATTENTION_DETERMINISTIC_MODE": "failed",
        "MAGI_ATTENTION_KERNEL_BACKENDS": "failed",
        "MAGI_ATTENTION_KERNEL_SPEEDS": "ok",
        "MAGI_ATTENTION_PRECISION": "failed",
        "configuration": "failed",
    }
    assert checks["MAGI_ATTENTION_KERNEL_SPEEDS"].detail == "1 measured figures"
    assert "fp8" in checks["MAGI_ATTENTION_PRECISION"].detail
    assert "a switch is on if its text is 1" in checks["MAGI_ATTENTION_DETERMINISTIC_MODE"].detail
    assert "misspelled" in checks["MAGI_ATTENTION_KERNEL_BACKENDS"].detail


def test_no_wrong_text_keeps_the_command_from_starting():
    wrong = {name: "nonsense" for name, variable in VARIABLES.items() if not variable.ignored}
    code = "from magi_attention.cli.main import app; app(['doctor', '--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **wrong})
    assert done.returncode == 0, done.stderr
    assert "Show what is installed" in done.stdout


@pytest.fixture
def distribution(tmp_path, monkeypatch):
    """Add a distribution to those that are installed."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def add(name: str, version: str, *requires: str, group: str = "magi_attention.kernels") -> None:
        info = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {each}" for each in requires)]) + "\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{name} = nowhere:X\n")

    return add


def test_plugins_must_have_the_versions_that_they_require(distribution):
    distribution("some-wheel", "1.3rc1", group="other")
    distribution("fits", "1.0", "some-wheel>=1.2,<2", "some-wheel==9; extra == 'test'", "numpy")
    distribution("old", "0.1", "some-wheel==1.2", "magi-attention>=0.0.1,<0.0.2", group="magi_attention.comm")
    distribution("alone", "2.0", "magi-attention", "not-there[cu13]==1.0")
    checks = {check.name: check for check in check_requirements()}
    assert checks["fits 1.0"].status == "ok"
    assert [checks[name].status for name in ("old 0.1", "alone 2.0")] == ["failed", "failed"]
    assert "requires some-wheel==1.2, installed is 1.3rc1; magi-attention<0.0.2,>=0.0.1, in" in checks["old 0.1"].detail
    assert checks["alone 2.0"].detail.endswith("it requires not-there[cu13]==1.0, which is not installed")
    assert not any(name.startswith(("magi-attention", "some-wheel")) for name in checks)


def test_the_core_may_run_with_a_torch_that_counts_as_older(distribution):
    """Of NVIDIA's containers: 2.9.0a0 comes before 2.9."""
    distribution("torch", "2.9.0a0+nv25.09", group="other")
    assert not [check for check in check_requirements() if "torch" in check.detail]


def test_the_command_prints_everything_and_exits_with_0(monkeypatch):
    monkeypatch.setattr(command, "check_requirements", list)  # of whatever plug-ins are here
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    for text in ("Machine", "Packages", "Kernel backends", "reference backward", "What would be chosen", "gloo"):
        assert text in result.stdout
    assert "Nothing is wrong" in result.stdout


def test_narrow_terminals_cut_no_path(monkeypatch, tmp_path):
    folder = tmp_path / "a-folder-whose-name-is-longer-than-the-column-is-wide"
    monkeypatch.setenv("MAGI_ATTENTION_CACHE_DIR", str(folder))
    monkeypatch.setattr(command, "check_requirements", list)
    printed = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "80"}).stdout
    assert "Checks" in printed
    assert "…" not in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is visible")
def test_a_driver_without_a_visible_gpu_is_told(install, monkeypatch, tmp_path, capsys):
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX Open Kernel Module  580.65.06  Release Build\n")
    monkeypatch.setattr(machine, "DRIVER_FILE", tmp_path / "version")
    install(reference=REFERENCE)
    command.run_doctor(as_json=False)
    told = " ".join(capsys.readouterr().out.split())
    assert (
        f"No GPU is visible to torch, though there is NVIDIA's driver 580.65.06; this torch, {torch.__version__}"
        in told
    )


def test_json_and_exit_status_of_a_failure(install, monkeypatch):
    monkeypatch.setattr(command, "check_requirements", lambda: [Check("plug-in 0.1", "failed", "old")])
    install(reference=REFERENCE, wrong=WrongBackend())
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert (found["version"], found["healthy"]) == (1, False)
    assert {check["name"] for check in found["checks"] if check["status"] == "failed"} == {
        "wrong forward",
        "wrong backward",
        "plug-in 0.1",
    }
    assert set(found["choices"]["causal"]["forward"]) == {"reference", "wrong"}
    page = (Path(__file__).parents[2] / "docs" / "backends.md").read_text(encoding="utf-8")
    (rows,) = re.findall(r"`--json` prints.*\n\n((?:\|.*\n)+)", page)
    assert {name for row in rows.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])} == set(found)
    fields = {name for each in ("backends", "checks") for name in found[each][0]}
    assert fields <= set(re.findall(r"`(\w+)`", rows))


def test_a_machine_without_any_backend(install, capsys):
    install()
    assert command.run_doctor(as_json=False) == 1
    assert "none is found" in re.sub(r"[\s│]+", " ", capsys.readouterr().out)  # wherever a cell's lines break
