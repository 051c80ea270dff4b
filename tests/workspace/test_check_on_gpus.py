# SPDX-License-Identifier: Apache-2.0
"""The script that runs on GPUs what CI can't: every suite that has such tests, and benchmarks as they can be called."""

import ast
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = spec_from_file_location("check_on_gpus", ROOT / "scripts" / "check_on_gpus.py")
check_on_gpus = module_from_spec(SPEC)
sys.modules[SPEC.name] = check_on_gpus  # its dataclass looks itself up
SPEC.loader.exec_module(check_on_gpus)
Step = check_on_gpus.Step


def steps(rounds):
    return [step for lanes in rounds for lane in lanes for step in lane]


def test_all_suites_with_gpu_tests_run():
    def has_gpu_tests(path):
        return any(
            isinstance(node, ast.Attribute) and node.attr == "gpu" for node in ast.walk(ast.parse(path.read_text()))
        )

    with_gpu_tests = {path.parent.name for path in ROOT.glob("tests/*/test_*.py") if has_gpu_tests(path)}
    run = {step.name for step in steps(check_on_gpus.tests()) if "pytest" in step.arguments}
    assert run == with_gpu_tests


def test_benchmarks_take_their_arguments():
    """Without a GPU they say that they need one, and not that an argument is wrong."""
    for step in steps([*check_on_gpus.tables(2), *check_on_gpus.million(2)]):
        done = subprocess.run([sys.executable, *step.arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)
        told = done.stderr + done.stdout
        assert done.returncode, told
        assert any(each in told for each in ("GPU", "CUDA")), told
        assert "unrecognized arguments" not in told


def test_steps_see_their_gpus_and_failures_are_told(tmp_path, capsys):
    def prints(name, code, gpus="all"):
        return Step(name, ("-c", f"import os; print(os.environ['CUDA_VISIBLE_DEVICES']); {code}"), gpus)

    good = [[[prints("one", "", "first"), prints("two", "", "last")], [prints("three", "")]]]
    assert check_on_gpus.run(good, tmp_path, 3)
    seen = {path.stem: path.read_text() for path in tmp_path.iterdir()}
    assert seen == {"one": "0\n", "two": "2\n", "three": "0,1,2\n"}
    assert not check_on_gpus.run([[[prints("bad", "raise SystemExit('no')")]], *good], tmp_path, 1)
    assert f"bad: FAILED (1), see {tmp_path}/bad.txt: no" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(check_on_gpus, "count_gpus", lambda: 0)
    with pytest.raises(SystemExit):
        check_on_gpus.main([str(tmp_path)])
    assert "PyTorch sees no GPU here" in capsys.readouterr().err
