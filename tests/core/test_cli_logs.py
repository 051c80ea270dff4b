# SPDX-License-Identifier: Apache-2.0
"""What the command-line tools log, and where: as MAGI_ATTENTION_LOG_LEVEL says."""

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from magi_attention.cli.main import app

BENCH = ["bench", "-p", "1", "--tokens", "256", "--heads-q", "2", "--heads-kv", "1", "--head-dim", "16"]
BENCH += ["--precision", "fp32", "--device", "cpu", "--warmup", "0", "--repeat", "1", "--json"]


@pytest.mark.parametrize(("level", "is_told"), [("info", True), ("", False), ("WARN", False)])
def test_ranks_log_to_stderr_from_the_level_on(level, is_told):
    command = [sys.executable, "-m", "magi_attention.cli", *BENCH]
    environment = os.environ | {"MAGI_ATTENTION_LOG_LEVEL": level}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["measured"]["backend"] == "reference"
    assert ("rank0 INFO magi_attention.kernels.registry: Kernel backends for" in done.stderr) == is_told


def test_a_level_that_is_none_is_told_in_one_line(monkeypatch):
    monkeypatch.setenv("MAGI_ATTENTION_LOG_LEVEL", "loud")
    result = CliRunner().invoke(app, BENCH)
    assert result.exit_code == 2
    assert result.stderr.startswith("magi: environment variable MAGI_ATTENTION_LOG_LEVEL='loud': must be one of")
    assert result.stderr.count("\n") == 1


def test_doctor_tells_of_a_level_that_is_none_among_all_else(monkeypatch):
    monkeypatch.setenv("MAGI_ATTENTION_LOG_LEVEL", "loud")
    monkeypatch.setenv("COLUMNS", "200")
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1
    (check,) = [each for each in json.loads(result.stdout)["checks"] if "LOG_LEVEL" in each["name"]]
    assert check["status"] == "failed"
