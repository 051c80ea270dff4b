# SPDX-License-Identifier: Apache-2.0
"""Where the switch between transports comes from."""

import logging

import numpy as np
import pytest

from magi_comm_grpcoll.calibrate import main
from magi_comm_grpcoll.routes import FEW_PIECES, choose_transport
from magi_comm_grpcoll.switch import FIRST_GUESS_BYTES, choose_switch, keep_switch, switch_bytes
from magi_comm_grpcoll.tables import ByteCopies


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MAGI_ATTENTION_CACHE_DIR", str(tmp_path))
    switch_bytes.cache_clear()
    yield tmp_path
    switch_bytes.cache_clear()


def test_copy_engines_take_over_where_they_stay_half_as_fast():
    push = {1: 300.0, 2: 310.0, 4: 320.0, 8: 320.0}
    assert choose_switch({1: 10.0, 2: 100.0, 4: 170.0, 8: 380.0}, push) == 4
    assert choose_switch({1: 290.0, 2: 100.0, 4: 170.0, 8: 380.0}, push) == 4
    assert choose_switch(push, push) == 1
    assert choose_switch({size: 1.0 for size in push}, push) == 16


def test_what_was_measured_is_kept_and_used(folder):
    assert switch_bytes("NVIDIA H200") == FIRST_GUESS_BYTES
    path = keep_switch("NVIDIA H200", {"copy_engine": {1 << 16: 300.0}, "push": {1 << 16: 310.0}})
    assert path.parent == folder / "grpcoll"
    assert switch_bytes("NVIDIA H200") == 1 << 16
    assert switch_bytes("NVIDIA B200") == FIRST_GUESS_BYTES
    pieces = ByteCopies(*(np.full(FEW_PIECES + 1, value) for value in (0, 1, 0, 0, 1 << 17)))
    assert choose_transport(pieces, "NVIDIA H200") == "copy_engine"
    assert choose_transport(pieces, "NVIDIA B200") == "push"


@pytest.mark.parametrize("text", ["{", "{}", '{"switch_bytes": 0}', "[]", '{"switch_bytes": "a"}'])
def test_a_file_that_is_something_else_is_ignored_with_a_warning(folder, text, caplog):
    (folder / "grpcoll").mkdir()
    (folder / "grpcoll" / "NVIDIA-H200.json").write_text(text)
    with caplog.at_level(logging.WARNING):
        assert switch_bytes("NVIDIA H200") == FIRST_GUESS_BYTES
    assert "NVIDIA-H200.json is ignored" in caplog.text


def test_the_command_tells_what_it_does_and_takes_no_arguments(monkeypatch, capsys):
    monkeypatch.setattr("magi_comm_grpcoll.calibrate.RankPool", None)  # nothing is measured
    monkeypatch.setattr("sys.argv", ["calibrate", "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        main()
    assert "Measure among all GPUs" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["calibrate", "--sizes"])
    with pytest.raises(SystemExit, match=r"^2$"):
        main()
