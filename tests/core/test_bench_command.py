# SPDX-License-Identifier: Apache-2.0
"""``magi bench`` on the CPU: what it prints, what it refuses, and how overlap is read from a trace."""

import dataclasses
import gzip
import inspect
import json
import os
import pty
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import magi_attention
from magi_attention.cli.bench.breakdown import Share, break_down
from magi_attention.cli.bench.overlap import Overlap, overlap_of, read_overlap
from magi_attention.cli.main import app

SMALL = ["--tokens", "512", "--heads-q", "4", "--heads-kv", "2", "--head-dim", "16", "--precision", "fp32"]
SMALL += ["--device", "cpu", "--repeat", "2", "--warmup", "1"]


def run(*arguments: str):
    return CliRunner().invoke(app, ["bench", *SMALL, *arguments])


def test_json_and_trace(tmp_path):
    trace = tmp_path / "trace.json"
    result = run("-p", "2", "--mask", "causal", "--json", "--trace", str(trace))
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    page = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    (rows,) = re.findall(r"`--json` prints.*\n\n((?:\|.*\n)+)", page)
    measured = printed["measured"]
    fields = {*printed, *measured, *measured["times"], "share", *(field.name for field in dataclasses.fields(Overlap))}
    assert fields == set(re.findall(r"`(\w+)`", rows))
    assert (measured["ranks"], measured["stages"], measured["backend"]) == (2, 2, "reference")
    assert measured["pairs"] == 512 * 513 // 2
    assert measured["overlap"] is None
    for name in ("forward", "backward"):
        rate = 4 * measured["pairs"] * 4 * 16 / 2 / measured["times"][name] / 1e12
        assert measured[f"{name}_tflops"] == pytest.approx(rate * (2.5 if name == "backward" else 1))
    names = {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert names >= {"magi: cast stage 1", "magi: attention stage 1", "magi: reduce stage 1"}


def test_the_length_for_gpus_is_not_taken_on_cpus():
    small = ["--heads-q", "1", "--heads-kv", "1", "--head-dim", "8", "--precision", "fp32", "--repeat", "1"]
    result = CliRunner().invoke(app, ["bench", *small, "--device", "cpu", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["options"]["tokens"] == 1024


def test_a_terminal_shows_what_is_done_and_the_output_stays_clean():
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "magi_attention.cli", "bench", *SMALL, "-p", "2", "--warmup", "2", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        with suppress(OSError):  # how a terminal says that nobody writes to it any more
            while part := os.read(ours, 4096):
                shown += part
        output = process.stdout.read()
    os.close(ours)
    assert process.returncode == 0
    assert json.loads(output)["measured"]["ranks"] == 2
    texts = [text.removeprefix("\x1b[K") for text in shown.decode().split("\r")[1:]]
    begun = ["starting 2 ranks", "planning", "warming up: pair of passes 1 of 2", "pass 1 of 4"]
    assert [text for text in texts if text in begun] == begun, shown
    assert texts[-1] == ""


def test_nothing_is_shown_where_there_is_no_terminal(capfd):
    result = run("-p", "1")
    assert result.exit_code == 0, result.output
    assert "pass 1" not in result.stderr + capfd.readouterr().err


def test_one_process_prints_a_table():
    result = run("--mask", "varlen-causal")
    assert result.exit_code == 0, result.output
    assert "1 stage, rank 0 receives 0 key rows" in " ".join(result.output.split())
    assert "backward" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeat", "0"], "--repeat must be at least 1, not 0"),
        (["--tokens", "200"], "--tokens 200 is too few for masks of several documents; take 256 or more"),
        (["--tokens", "5000000000"], "--tokens must be at most 2147483647, not 5000000000"),
        (["--sm-margin", "-1"], "--sm-margin must be at least 0, not -1"),
        (["--heads-q", "3"], "--heads-q 3 must be a multiple of --heads-kv 2"),
        (["--trace", "trace.txt"], "--trace trace.txt must end in one of .json, .gz"),
        (["--mask", "nothing"], "--mask nothing is none of full, causal, varlen_full,"),
        (["--backend", "nothing"], "There is no kernel backend 'nothing'; known are auto,"),
        (["--overlap-degree", "65"], "--overlap-degree must be at most 64"),
        (["--overlap-degree", "many"], "--overlap-degree must be 0 or more, or auto, not many"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_native_collectives_are_refused_where_there_are_none():
    result = CliRunner().invoke(app, ["bench", "--device", "cpu", "-p", "2", "--tokens", "256", "--native"])
    assert result.exit_code == 2
    assert result.stderr.startswith("magi: native_grpcoll ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["bench", "calibrate", "demo"])
def test_two_hops_are_refused_where_no_mesh_is_made(monkeypatch, command):
    monkeypatch.setenv("MAGI_ATTENTION_HIERARCHICAL_COMM", "1")
    result = CliRunner().invoke(app, [command, "--device", "cpu"])
    assert result.exit_code == 2
    assert result.stderr.startswith("magi: MAGI_ATTENTION_HIERARCHICAL_COMM=1 needs a mesh of nodes and their ranks")
    assert result.stderr.endswith("unset it\n")


@pytest.mark.parametrize("command", ["bench", "demo"])
def test_an_environment_without_sense_is_refused_before_ranks_start(monkeypatch, command):
    monkeypatch.setenv("MAGI_ATTENTION_CHECK_PLAN_TIMEOUT", "soon")
    result = CliRunner().invoke(app, [command, "--device", "cpu", "-p", "2", "--tokens", "256"])
    assert result.exit_code == 2
    assert result.stderr.startswith("magi: environment variable MAGI_ATTENTION_CHECK_PLAN_TIMEOUT='soon': ")
    assert result.stderr.count("\n") == 1


def test_what_draws_pictures_is_not_imported():
    """It takes a second, and writes to the home folder, which containers may lack."""
    code = "import sys, magi_attention.cli.bench.command; print('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize("command", app.registered_commands, ids=lambda command: command.callback.__name__)
def test_help_is_wrapped_by_the_terminal_alone(command):
    """Of all paragraphs but the first, Typer keeps line breaks, which come between those of a narrow terminal."""
    assert not [each for each in inspect.getdoc(command.callback).split("\n\n")[1:] if "\n" in each]


def test_the_version_is_told():
    assert CliRunner().invoke(app, ["--version"]).output.strip() == f"magi-attention {magi_attention.__version__}"


@pytest.mark.parametrize("command", ["bench", "demo"])
def test_a_variable_without_sense_is_told_before_ranks_start(command, monkeypatch):
    monkeypatch.setenv("MAGI_ATTENTION_MIN_CHUNKS_PER_RANK", "0")
    result = CliRunner().invoke(app, [command])
    assert result.exit_code == 2
    assert result.output.startswith("magi: environment variable MAGI_ATTENTION_MIN_CHUNKS_PER_RANK='0': must be")


def test_more_processes_than_gpus_are_refused():
    too_many = torch.cuda.device_count() + 1
    result = CliRunner().invoke(app, ["bench", "--device", "cuda", "-p", str(too_many)])
    assert result.exit_code == 2
    assert "needs a GPU for each process" in result.output


def kernel(stream: int, start: float, stop: float, kind: str = "kernel", name: str = "k") -> dict:
    return {"cat": kind, "tid": stream, "ts": start, "dur": stop - start, "name": name}


def annotation(name: str, stream: int, start: float, stop: float) -> dict:
    return kernel(stream, start, stop, "gpu_user_annotation", f"magi: {name}")


def test_overlap_counts_kernels_in_ranges_of_their_stream():
    events = [
        annotation("cast stage 1", 20, 0, 10),
        kernel(20, 0, 2),
        kernel(20, 4, 10),  # from 2 to 4 the stream only waits
        annotation("reduce stage 1", 20, 30, 40),
        kernel(20, 30, 40),
        annotation("attention stage 0", 7, 1, 8),
        kernel(7, 1, 8),
        kernel(7, 8, 35),  # in no range
        annotation("attention stage 1", 7, 35, 38),
        kernel(7, 35, 38),
        {"cat": "cpu_op", "name": "other", "ts": 0, "dur": 100, "tid": 1},
    ]
    overlap = overlap_of(events)
    assert overlap == Overlap(communication=18e-6, attention=10e-6, both=8e-6)
    assert overlap.share == pytest.approx(8 / 18)
    assert overlap_of(events[-1:]) is None
    assert overlap_of([kernel(7, 0, 1)]).share == 1


def test_compressed_traces_are_read(tmp_path):
    path = tmp_path / "trace.json.gz"
    events = [annotation("cast stage 1", 3, 0, 1), kernel(3, 0, 1)]
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    assert read_overlap(path) == Overlap(1e-6, 0.0, 0.0)


def test_a_trace_is_broken_down_by_stream_and_range():
    events = [
        annotation("attention stage 0", 7, 0, 10),
        kernel(7, 0, 4),
        kernel(7, 5, 10),
        kernel(7, 12, 13, "gpu_memcpy"),
        annotation("cast stage 1", 20, 3, 9),
        annotation("inner", 20, 3, 4),
        kernel(20, 3, 4),
        kernel(20, 5, 9),
        {"cat": "cpu_op", "name": "other", "ts": 0, "dur": 100, "tid": 1},
    ]
    assert break_down(events) == [
        Share(7, "attention stage 0", 2, 9e-6),
        Share(7, "other", 1, 1e-6),
        Share(7, "idle", 0, 3e-6),
        Share(20, "inner", 1, 1e-6),
        Share(20, "cast stage 1", 1, 4e-6),
        Share(20, "idle", 0, 1e-6),
    ]
    assert break_down(events[-1:]) == []
