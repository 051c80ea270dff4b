# SPDX-License-Identifier: Apache-2.0
"""When the kernels are compiled anew, without a compiler."""

import os
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import pytest

from magi_comm_grpcoll.heap import SWITCH_OFF, reason_against_nvshmem

HOOK = Path(__file__).parents[2] / "packages" / "comm-grpcoll" / "hatch_build.py"


@pytest.fixture
def build():
    pytest.importorskip("hatchling", reason="the build hook needs hatchling: pip install hatchling")
    spec = spec_from_file_location("grpcoll_build", HOOK)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("text", "is_on"), [("1", True), ("0", False), ("", False), ("false", False)])
def test_switches_are_on_where_they_are_1(build, monkeypatch, text, is_on):
    monkeypatch.setenv(build.SETTING, text)
    monkeypatch.setenv(SWITCH_OFF, text)
    assert build.is_switched_off() == is_on
    assert ("switched off" in reason_against_nvshmem()) == is_on


@pytest.mark.parametrize("changed", ["csrc/put.cu", "csrc/memory.cuh", "hatch_build.py"])
def test_what_a_fatbin_is_made_of_and_how_makes_it_anew(build, monkeypatch, tmp_path, changed):
    compiled: list[str] = []

    def compile_fatbin(source: Path, fatbin: Path) -> None:
        compiled.append(source.stem)
        fatbin.touch()
        os.utime(fatbin, (200, 200))

    monkeypatch.setattr(build, "compile_fatbin", compile_fatbin)
    monkeypatch.delenv(build.SETTING, raising=False)
    (tmp_path / "csrc").mkdir()
    for name in ("csrc/put.cu", "csrc/memory.cuh", "hatch_build.py"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (100, 100))
    hook, data = SimpleNamespace(root=tmp_path, config={"output": "made"}), {"artifacts": []}
    for _ in range(2):
        build.FatbinHook.initialize(hook, "standard", data)
    assert compiled == ["put"]
    os.utime(tmp_path / changed, (300, 300))
    build.FatbinHook.initialize(hook, "standard", data)
    assert compiled == ["put", "put"]
    assert set(data["artifacts"]) == {"made/*.fatbin"}


def test_no_fatbin_outlives_its_source(build, monkeypatch, tmp_path):
    monkeypatch.delenv(build.SETTING, raising=False)
    for name in ("csrc/put.cu", "hatch_build.py", "made/put.fatbin", "made/renamed.fatbin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    hook = SimpleNamespace(root=tmp_path, config={"output": "made"})
    build.FatbinHook.initialize(hook, "standard", {"artifacts": []})
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["put.fatbin"]
