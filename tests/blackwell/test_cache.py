# SPDX-License-Identifier: Apache-2.0
"""Where compiled kernels are kept, also where they cannot be. Needs none of the wheels."""

import logging
import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from magi_attention.env.build import kernel_cache_dir
from magi_kernels_blackwell import cache

ENABLED, DIRECTORY = "PROJECT_CUTE_DSL_CACHE_ENABLED", "PROJECT_CUTE_DSL_CACHE_DIR"
VARIABLE = "MAGI_ATTENTION_FFA_FA4_CACHE_DIR"
HOPPER_HERE, BLACKWELL_HERE = (f"project/{arch}_{platform.machine()}" for arch in ("sm_90", "sm_100"))


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    monkeypatch.setattr(cache, "_folders", {})
    monkeypatch.setattr(cache, "_unkept", [])
    yield
    cache._warn_of.cache_clear()
    cache._linked.cache_clear()


def folder_inside(folder: str = "project/sm_90", prefix: str = "PROJECT") -> Path:
    """What the project reads while it is imported."""
    with cache.kept_in(folder, prefix):
        assert os.environ[f"{prefix}_CUTE_DSL_CACHE_ENABLED"] == "1"
        return Path(os.environ[f"{prefix}_CUTE_DSL_CACHE_DIR"])


def test_folder_by_environment_variables(monkeypatch, tmp_path):
    for name in (VARIABLE, "MAGI_ATTENTION_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert kernel_cache_dir() == Path.home() / ".cache/magi_attention/cute_kernels"
    for name, folder in (
        ("XDG_CACHE_HOME", tmp_path / "magi_attention/cute_kernels"),
        ("MAGI_ATTENTION_CACHE_DIR", tmp_path / "cute_kernels"),
        (VARIABLE, tmp_path),
    ):
        monkeypatch.setenv(name, str(tmp_path))
        assert kernel_cache_dir() == folder


def test_projects_read_the_folder_while_they_are_imported(monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    monkeypatch.setenv(DIRECTORY, "before")
    assert folder_inside() == tmp_path / HOPPER_HERE
    assert (tmp_path / HOPPER_HERE).is_dir()
    assert not cache.why_unkept()
    assert os.environ[DIRECTORY] == "before"
    assert ENABLED not in os.environ


def test_threads_that_begin_at_the_same_time_import_one_after_another(monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    monkeypatch.setenv(DIRECTORY, "before")
    num_threads = 4
    together, inside = Barrier(num_threads), []

    def import_it(number: int) -> Path:
        together.wait()
        with cache.kept_in("project/sm_90", "PROJECT"):
            inside.append(number)
            time.sleep(0.01)  # so that the others come meanwhile
            assert inside[-1] == number
            return Path(os.environ[DIRECTORY])

    with ThreadPoolExecutor(num_threads) as pool:
        assert set(pool.map(import_it, range(num_threads))) == {tmp_path / HOPPER_HERE}
    assert os.environ[DIRECTORY] == "before"
    assert ENABLED not in os.environ


def test_an_import_that_fails_leaves_no_trace(monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(ImportError), cache.kept_in("project/sm_90", "PROJECT"):
        raise ImportError
    assert ENABLED not in os.environ
    assert folder_inside("project/sm_100") == tmp_path / BLACKWELL_HERE
    with pytest.raises(RuntimeError, match="has loaded project/sm_100"):
        folder_inside("project/sm_90")


def test_a_users_own_setting_stays(monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    monkeypatch.setenv(ENABLED, "0")
    with cache.kept_in("project/sm_90", "PROJECT"):
        assert os.environ[ENABLED] == "0"
        assert DIRECTORY not in os.environ
    assert not list(tmp_path.iterdir())
    assert f"{ENABLED} is '0'" in cache.why_switched_off("PROJECT")
    assert not cache.why_unkept()  # of other projects
    monkeypatch.setenv(ENABLED, "1")
    assert not cache.why_switched_off("PROJECT")


def test_a_process_has_one_folder_for_each_project(monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert folder_inside() == folder_inside()
    assert folder_inside("other/sm_100", "OTHER") == tmp_path / f"other/sm_100_{platform.machine()}"
    with pytest.raises(RuntimeError, match="has loaded project/sm_90, and cannot load project/sm_100"):
        folder_inside("project/sm_100")
    monkeypatch.setenv(ENABLED, "0")
    with pytest.raises(RuntimeError, match="need a process each"), cache.kept_in("project/sm_103", "PROJECT"):
        pass


def test_a_folder_that_cannot_be_made_is_told_once(monkeypatch, caplog):
    monkeypatch.setenv(VARIABLE, "/proc/nothere")
    with caplog.at_level(logging.WARNING):
        first, second = folder_inside(), folder_inside("other/sm_90", "OTHER")
    for folder in (first, second):
        (folder / "kernel.o").write_text("of this process")
    assert first != second
    assert len(caplog.records) == 1
    assert VARIABLE in caplog.text
    assert "/proc/nothere" in caplog.text
    assert cache.why_unkept().startswith("kernels cannot be kept in /proc/nothere: ")


def test_kernels_of_hosts_of_another_kind_are_kept_apart(monkeypatch, tmp_path):
    """A kernel holds code for the processor that launches it: an x86-64's is of no use to Grace."""
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert folder_inside() == tmp_path / "project/sm_90_aarch64"


def test_kernels_in_a_folder_that_cannot_be_written_are_found(monkeypatch, tmp_path, caplog):
    kernel = tmp_path / HOPPER_HERE / "fingerprint/fwd/1234.o"
    kernel.parent.mkdir(parents=True)
    kernel.write_text("compiled ahead of time")
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    monkeypatch.setattr(cache, "why_unwritable", lambda folder: "Read-only file system")
    with caplog.at_level(logging.WARNING):
        folder = folder_inside()
    assert (folder / "fingerprint/fwd/1234.o").read_text() == "compiled ahead of time"
    (folder / "fingerprint/fwd/5678.o").write_text("of this process")
    assert [path.name for path in tmp_path.rglob("*.o")] == ["1234.o"]
    assert "Read-only file system" in caplog.text
