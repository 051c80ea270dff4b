# SPDX-License-Identifier: Apache-2.0
"""`magi calibrate` and what reads its rates."""

import io
import json
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from typer.testing import CliRunner

from magi_attention.cli.calibrate import run_calibrate
from magi_attention.cli.main import app
from magi_attention.plan.rates import Rates, default_rates
from magi_attention.runtime.machine import make_layer
from magi_attention.runtime.measure import measure_kernels
from magi_attention.runtime.rates_file import newest_rates_path, read_rates
from magi_attention.testing.distributed import run_ranks

SMALL = ["--heads-q", "4", "--heads-kv", "2", "--head-dim", "16"]
PLAN = ["plan", "--mask", "causal", "--tokens", "4096", "--ranks", "4", "--json"]


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MAGI_ATTENTION_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")


def run(*flags):
    return CliRunner().invoke(app, list(map(str, flags)))


def cluster_of(*flags):
    result = run(*PLAN, *flags)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["assumed"]["cluster"]


def test_alone_it_measures_kernels_and_memory_and_plans_can_use_that():
    result = run("calibrate", *SMALL, "--device", "cpu")
    assert result.exit_code == 0, result.output
    path = newest_rates_path()
    assert str(path) in result.stdout
    assert "cpu, 1 rank: reference kernels, float32, head dim 16" in result.stdout
    assert result.stdout.count("not measured") == 3
    rates = read_rates(path)
    links = {"link_gbs", "nvlink_gbs", "exchange_latency_us"}
    same = {name for name, value in default_rates("cpu").to_json().items() if value == rates.to_json()[name]}
    assert links <= same
    for given in ("measured", path):
        assert cluster_of("--rates", given) == {**rates.to_json(), "ranks_per_node": 8}
    changed = cluster_of("--rates", path, "--link", 3, "--tflops", 12)
    assert (changed["link_gbs"], changed["forward_tflops"], changed["backward_tflops"]) == (3, 12, 10)
    assert changed["memory_gbs"] == rates.memory_gbs


def test_rates_that_no_folder_keeps_are_an_error(monkeypatch):
    monkeypatch.setenv("MAGI_ATTENTION_CACHE_DIR", "/proc/magi")
    with mock.patch("magi_attention.cli.calibrate.measure_together") as measure:
        result = run("calibrate", *SMALL, "--device", "cpu")
    assert not measure.called
    assert result.exit_code == 2
    assert "can't be kept in /proc/magi" in result.stderr
    assert "Kept in" not in result.stdout


def test_without_rates_plans_take_the_round_numbers():
    assert cluster_of() == {**Rates().to_json(), "ranks_per_node": 8}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([*PLAN, "--rates", "measured"], "nothing was measured on this machine yet; run magi calibrate"),
        ([*PLAN, "--rates", "/no/such/file"], "--rates /no/such/file: No such file or directory"),
        (["calibrate", "--heads-q", "3", "--heads-kv", "2"], "heads_q must be a multiple of heads_kv=2, not 3"),
        (["calibrate", "--backend", "cudnn"], "There is no kernel backend 'cudnn'"),
        (["calibrate", *SMALL, "--device", "cpu", "--backend", "flex"], "use the backend 'reference'"),
    ],
)
def test_mistakes_are_told(flags, message):
    result = run(*flags)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_a_file_of_something_else_is_told(tmp_path):
    (tmp_path / "rates.json").write_text('{"link_gbs": 1}')
    result = run(*PLAN, "--rates", tmp_path / "rates.json")
    assert result.exit_code == 2
    assert "holds no rates as `magi calibrate` writes them" in result.stderr


def calibrate_on_ranks(rank, world_size, device):
    text = io.StringIO()
    with mock.patch.object(dist, "is_torchelastic_launched", return_value=True):
        run_calibrate((4, 2, 16), "input", "auto", device, Console(file=text, width=200))
    return text.getvalue()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu(2))])
def test_under_torchrun_it_measures_links_too(device):
    shown = run_ranks(2, calibrate_on_ranks, device, backend="gloo" if device == "cpu" else "nccl")
    assert "2 ranks" in shown[0]
    assert shown[0].count("not measured") == 1
    assert shown[1] == ""
    defaults = default_rates("cpu" if device == "cpu" else torch.cuda.get_device_name())
    rates = read_rates(newest_rates_path())
    print(rates)
    assert rates.link_gbs == defaults.link_gbs
    assert rates.nvlink_gbs != defaults.nvlink_gbs


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::UserWarning:torch.*")
def test_kernels_of_a_gpu_are_measured():
    layer = make_layer((16, 4, 128), torch.device("cuda", 0), "input", "auto")
    state = torch.cuda.get_rng_state()
    times = measure_kernels(layer)
    print(layer.backends.name, times)
    assert torch.equal(state, torch.cuda.get_rng_state())
    # What no GPU that runs this is below, or beyond.
    assert 1 < times.forward_tflops < 10_000
    assert 1 < times.backward_tflops < 10_000
    assert 10 < times.memory_gbs < 100_000
    assert 1 < times.kernel_latency_us < 100_000
