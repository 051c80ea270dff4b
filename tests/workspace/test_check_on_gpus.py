# SPDX-License-Identifier: Apache-2.0
"""The script that runs on GPUs what CI can't: every suite that has such tests, with arguments that benchmarks take."""

import ast
import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from typer.main import get_command

from magi_attention.cli.main import app

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[2]
SPEC = spec_from_file_location("check_on_gpus", ROOT / "scripts" / "check_on_gpus.py")
check_on_gpus = module_from_spec(SPEC)
sys.modules[SPEC.name] = check_on_gpus  # its dataclass looks itself up
SPEC.loader.exec_module(check_on_gpus)
Step = check_on_gpus.Step


def steps(rounds):
    return [step for lanes in rounds for lane in lanes for step in lane]


def suites_with(marker):
    """The folders of tests that have this marker."""

    def has_it(path):
        return any(
            isinstance(node, ast.Attribute) and node.attr == marker for node in ast.walk(ast.parse(path.read_text()))
        )

    return {path.parent.name for path in ROOT.glob("tests/*/test_*.py") if has_it(path)}


def test_all_suites_with_gpu_tests_run():
    run = [step for step in steps(check_on_gpus.tests()) if "pytest" in step.arguments]
    assert {step.name for step in run} == suites_with("gpu") | {"alone"}


def test_tests_that_want_their_gpu_alone_run_in_one_process_while_no_other_does():
    (lanes,) = [lanes for lanes in check_on_gpus.tests() if "alone" in {step.name for step in steps([lanes])}]
    ((step,),) = lanes
    assert not any("--numprocesses" in argument for argument in step.arguments)
    assert {argument for argument in step.arguments if "/" in argument} == {f"tests/{x}" for x in suites_with("alone")}


def test_a_test_that_wants_its_gpu_alone_is_skipped_beside_others(pytester, monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER_COUNT", raising=False)  # of those that run this
    pytester.makeconftest((ROOT / "tests" / "conftest.py").read_text())
    pytester.makeini("[pytest]\nmarkers = alone\n    gpu")
    pytester.makepyfile("import pytest\n@pytest.mark.alone\ndef test_it():\n    pass")
    pytester.runpytest_subprocess("--numprocesses=0").assert_outcomes(passed=1)
    beside = pytester.runpytest_subprocess("--numprocesses=2", "-rs")
    beside.assert_outcomes(skipped=1)
    beside.stdout.fnmatch_lines(["*needs its GPU to itself, 2 processes share it*"])


@pytest.mark.parametrize("num_gpus", [1, 2, 4])
def test_benchmarks_take_their_arguments(num_gpus):
    commands = get_command(app).commands
    for step in steps([*check_on_gpus.tables(num_gpus), *check_on_gpus.million(num_gpus)]):
        first, *others = step.arguments
        if first == "-m":
            _, name, *others = others
            known = {option for parameter in commands[name].params for option in parameter.opts}
        else:
            known = set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', (ROOT / first).read_text()))
        assert known >= {each for each in others if each.startswith("-")}


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
