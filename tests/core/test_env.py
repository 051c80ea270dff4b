# SPDX-License-Identifier: Apache-2.0
"""Environment variables: each has a documented function, a default and a clear error."""

import importlib
import pwd
import re
from pathlib import Path

import pytest

import magi_attention
from magi_attention.common.enum import MagiAttentionPrecision
from magi_attention.env import VARIABLES, build, comm, general

PUBLIC = [
    "MAGI_ATTENTION_KERNEL_BACKEND",
    "MAGI_ATTENTION_SDPA_BACKEND",
    "MAGI_ATTENTION_FA4_BACKEND",
    "MAGI_ATTENTION_PRECISION",
    "MAGI_ATTENTION_MIN_CHUNKS_PER_RANK",
    "MAGI_ATTENTION_KERNEL_BACKEND_BACKWARD",
    "MAGI_ATTENTION_KERNEL_SPEEDS",
    "MAGI_ATTENTION_DIST_ATTN_RUNTIME_DICT_SIZE",
    "MAGI_ATTENTION_DETERMINISTIC_MODE",
    "MAGI_ATTENTION_SANITY_CHECK",
    "MAGI_ATTENTION_LOG_LEVEL",
    "MAGI_ATTENTION_CPP_BACKEND",
    "MAGI_ATTENTION_QO_COMM",
    "MAGI_ATTENTION_HIERARCHICAL_COMM",
    "MAGI_ATTENTION_NATIVE_GRPCOLL",
    "MAGI_ATTENTION_FORWARD_HIGH_PRECISION_REDUCE",
    "MAGI_ATTENTION_BACKWARD_HIGH_PRECISION_REDUCE",
    "MAGI_ATTENTION_DSINK_ALL_REDUCE_OP",
    "MAGI_ATTENTION_FFA_FORWARD_SM_MARGIN",
    "MAGI_ATTENTION_FFA_BACKWARD_SM_MARGIN",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "MAGI_ATTENTION_FLATTEN_HEAD_GROUPS",
    "MAGI_ATTENTION_AUTO_RANGE_MERGE",
    "MAGI_ATTENTION_CATGQA",
    "MAGI_ATTENTION_BWD_HIDE_TAIL_REDUCE",
    "MAGI_ATTENTION_KEEP_RECEIVED",
    "MAGI_ATTENTION_PROFILE_MODE",
    "MAGI_ATTENTION_NO_BUILD_CACHE",
    "MAGI_ATTENTION_WORKSPACE_BASE",
    "MAGI_ATTENTION_FORCE_JIT_BUILD",
    "MAGI_ATTENTION_BUILD_VERBOSE",
    "MAGI_ATTENTION_BUILD_DEBUG",
    "NVCC_THREADS",
    "MAGI_ATTENTION_PREBUILD_FFA",
    "MAGI_ATTENTION_PREBUILD_FFA_JOBS",
    "MAX_JOBS",
    "MAGI_ATTENTION_SKIP_CUDA_BUILD",
    "MAGI_ATTENTION_SKIP_MAGI_ATTN_EXT_BUILD",
    "MAGI_ATTENTION_SKIP_MAGI_ATTN_COMM_BUILD",
    "MAGI_ATTENTION_BUILD_COMPUTE_CAPABILITY",
    "MAGI_ATTENTION_ALLOW_BUILD_WITH_CUDA12",
    "MAGI_ATTENTION_FORCE_CXX11_ABI",
    "MAGI_ATTENTION_FFA_FA4_CACHE_DIR",
    "XDG_CACHE_HOME",
    "NVSHMEM_DIR",
    "MAGI_ATTENTION_TEST_WORLD_SIZE",
    "MAGI_ATTENTION_PARAMETERIZE_RUN_IN_MP",
    "MAGI_ATTENTION_UNITEST_PROFILE_MODE",
    "MAGI_ATTENTION_CHECK_PLAN",
    "MAGI_ATTENTION_CHECK_PLAN_TIMEOUT",
    "MAGI_ATTENTION_SKIP_OVERLAP_CHECK",
    "MAGI_ATTENTION_CACHE_DIR",
    "MAGI_ATTENTION_MEASURE_RATES",
    "LOCAL_WORLD_SIZE",
]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def reader_of(variable):
    module, function = variable.reader.split(".")
    return getattr(importlib.import_module(f"magi_attention.env.{module}"), function)


def test_the_table_lists_every_public_variable_and_no_other():
    assert set(VARIABLES) == set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_each_variable_has_a_documented_function_of_its_own(name):
    variable, readers = VARIABLES[name], [each.reader for each in VARIABLES.values()]
    reader = reader_of(variable)
    assert readers.count(variable.reader) == 1
    assert " ".join(reader.__doc__.split()) == variable.meaning
    assert variable.meaning.endswith(".")
    assert reader() == reader()  # the default is valid


def test_variables_are_listed_as_in_effect_where_something_reads_them():
    packages = Path(__file__).parents[2] / "packages"
    code = "".join(path.read_text() for path in packages.glob("*/src/**/*.py"))
    for variable in VARIABLES.values():
        function = variable.reader.split(".")[1]
        is_read = bool(re.search(rf"(?<!def )\b{function}\b", code))
        assert is_read or variable.ignored, f"nothing reads {variable.name}"


FLAGS = [name for name in PUBLIC if VARIABLES[name].default in ("0", "1") and reader_of(VARIABLES[name])() in (0, 1)]


@pytest.mark.parametrize("name", FLAGS)
def test_one_switches_a_flag_on_and_anything_else_off(monkeypatch, name):
    reader = reader_of(VARIABLES[name])
    for text, value in (("1", True), ("0", False), ("true", False), (" 1 ", True)):
        monkeypatch.setenv(name, text)
        assert reader() is value
    monkeypatch.setenv(name, "")
    assert reader() is (VARIABLES[name].default == "1")


@pytest.mark.parametrize(
    ("reader", "name", "text", "value", "default"),
    [
        (general.kernel_backend, "MAGI_ATTENTION_KERNEL_BACKEND", "SDPA_ol", "sdpa_ol", "auto"),
        (general.precision, "MAGI_ATTENTION_PRECISION", "FP64", "fp64", "input"),
        (general.min_chunks_per_rank, "MAGI_ATTENTION_MIN_CHUNKS_PER_RANK", "3", 3, 8),
        (general.dist_attn_runtime_dict_size, "MAGI_ATTENTION_DIST_ATTN_RUNTIME_DICT_SIZE", "-1", -1, 1000),
        (general.ffa_forward_sm_margin, "MAGI_ATTENTION_FFA_FORWARD_SM_MARGIN", "2", 2, 4),
        (general.ffa_backward_sm_margin, "MAGI_ATTENTION_FFA_BACKWARD_SM_MARGIN", "0", 0, 4),
        (general.cuda_device_max_connections, "CUDA_DEVICE_MAX_CONNECTIONS", "1", 1, 8),
        (general.log_level, "MAGI_ATTENTION_LOG_LEVEL", "debug", "DEBUG", "WARNING"),
        (general.cache_dir, "MAGI_ATTENTION_CACHE_DIR", "/c", Path("/c"), Path.home() / ".cache/magi_attention"),
        (general.world_size_filter, "MAGI_ATTENTION_TEST_WORLD_SIZE", "4", 4, None),
        (comm.dsink_all_reduce_op, "MAGI_ATTENTION_DSINK_ALL_REDUCE_OP", "AVG", "avg", "none"),
        (comm.local_world_size, "LOCAL_WORLD_SIZE", "8", 8, None),
        (build.workspace_base, "MAGI_ATTENTION_WORKSPACE_BASE", "/scratch", "/scratch", "$HOME"),
        (build.nvcc_threads, "NVCC_THREADS", "2", 2, 4),
    ],
)
def test_values(monkeypatch, reader, name, text, value, default):
    assert reader() == default
    monkeypatch.setenv(name, text)
    assert reader() == value


def test_what_is_kept_follows_the_users_cache(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert general.cache_dir() == Path("/x/magi_attention")
    assert build.kernel_cache_dir() == Path("/x/magi_attention/cute_kernels")


@pytest.mark.parametrize("reader", [general.cache_dir, general.user_cache_dir])
def test_a_user_without_a_home_is_told_what_to_set(monkeypatch, reader):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    with pytest.raises(ValueError, match=r"_CACHE_\w+=''.*no home folder for ~/.cache.*; set it to a folder"):
        reader()


@pytest.mark.parametrize(
    ("name", "text", "right"),
    [
        ("MAGI_ATTENTION_KERNEL_BACKEND", "cudnn", "auto, ffa, fa4"),
        ("MAGI_ATTENTION_PRECISION", "fp8", "bf16, fp16, fp32, fp64"),
        ("MAGI_ATTENTION_DSINK_ALL_REDUCE_OP", "max", "none, sum, avg"),
        ("MAGI_ATTENTION_LOG_LEVEL", "LOUD", "debug, info"),
        ("MAGI_ATTENTION_MIN_CHUNKS_PER_RANK", "0", "at least 1"),
        ("MAGI_ATTENTION_MIN_CHUNKS_PER_RANK", "many", "whole number"),
        ("MAGI_ATTENTION_FFA_FORWARD_SM_MARGIN", "-1", "at least 0"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_variable_value_and_what_is_right(monkeypatch, name, text, right):
    monkeypatch.setenv(name, text)
    for error in (ValueError, AssertionError):
        with pytest.raises(error, match=f"{name}='{text}'.*{right}"):
            reader_of(VARIABLES[name])()


def test_older_switches_of_the_kernel_backend(monkeypatch):
    monkeypatch.setenv("MAGI_ATTENTION_SDPA_BACKEND", "1")
    assert general.kernel_backend() == "sdpa"
    monkeypatch.setenv("MAGI_ATTENTION_FA4_BACKEND", "1")
    with pytest.raises(AssertionError, match="both 1"):
        general.kernel_backend()
    monkeypatch.delenv("MAGI_ATTENTION_SDPA_BACKEND")
    assert general.kernel_backend() == "fa4"
    monkeypatch.setenv("MAGI_ATTENTION_KERNEL_BACKEND", "ffa")
    with pytest.raises(AssertionError, match="MAGI_ATTENTION_FA4_BACKEND is 1"):
        general.kernel_backend()


def test_no_margin_with_a_single_hardware_queue(monkeypatch):
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    assert (general.ffa_forward_sm_margin(), general.ffa_backward_sm_margin()) == (0, 0)


def test_precisions_have_torch_types():
    import torch

    wanted = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
    assert [precision.to_torch_dtype() for precision in MagiAttentionPrecision] == wanted


def test_nothing_else_reads_the_environment():
    """Setting a variable for a library that reads it is allowed; nothing but the table's functions may read one."""
    source = Path(magi_attention.__file__).parent
    reads = re.compile(r"os\.getenv\(|os\.environ\.get\(|os\.environ\[[^]]*\](?!\s*=[^=])| in os\.environ\b")
    readers = {path.relative_to(source).as_posix() for path in source.rglob("*.py") if reads.search(path.read_text())}
    assert readers == {"env/variables.py"}
