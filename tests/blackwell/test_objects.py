# SPDX-License-Identifier: Apache-2.0
"""Kernels on disk, as both projects keep them: whole, without locks, for any processor. Compiles in a process."""

import errno
import fcntl
import re
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from magi_attention.kernels.protocol import PrecompileCase
from magi_kernels_blackwell import cache, objects
from magi_kernels_blackwell.wheels import CUDNN_FRONTEND, FLASH_ATTENTION, missing_wheels
from tests.blackwell.matrix import keep_in

MISSING = missing_wheels(tuple((FLASH_ATTENTION | CUDNN_FRONTEND).items()))
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

STORAGES = ("flash_attn.cute.cache_utils", "cudnn.flex_attention.runtime.compile_cache")
NUM_PARAMETERS = "Expects 2 parameters"
"""What a kernel that runs says when it is called without arguments; there need be no GPU."""


@pytest.fixture(scope="module")
def process():
    """A process that imports both projects: here that would fix their settings for all other tests."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield pool


@pytest.fixture(params=STORAGES)
def checked(request, process, tmp_path) -> Callable[..., None]:
    """Run a check in the process, with a project's class of caches, a kernel and a folder."""
    return lambda check: process.submit(_run, check, request.param, tmp_path).result()


def _run(check: Callable[[Any, Any, Path], None], module: str, folder: Path) -> None:
    cache._unkept.clear()
    storage = import_module(module).JITPersistentCache
    objects.share_objects(storage)
    check(storage, _small_kernel(), folder)


def _small_kernel() -> Any:
    import cutlass
    from cutlass import cute
    from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

    @cute.kernel
    def copy_one(x: cute.Tensor) -> None:
        x[0] = x[1]

    @cute.jit
    def launch(x: cute.Tensor, stream: Any) -> None:
        copy_one(x).launch(grid=[1, 1, 1], block=[32, 1, 1], stream=stream)

    x = make_fake_compact_tensor(cutlass.Float32, (8,), assumed_align=16)
    return cute.compile(launch, x, make_fake_stream(), options="--enable-tvm-ffi --gpu-arch sm_90a")


def _only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_a_kernel_is_found_again_and_runs(checked):
    checked(_find_again)


def _find_again(storage: Any, kernel: Any, folder: Path) -> None:
    storage(folder)["key"] = kernel
    assert _only_file(folder).suffix == ".o"
    later = storage(folder)
    assert "other key" not in later
    assert "key" in later
    with pytest.raises(TypeError, match=NUM_PARAMETERS):
        later["key"]()
    assert not cache.why_unkept()


def test_what_a_killed_process_left_is_replaced(checked):
    checked(_replace_parts)


def _replace_parts(storage: Any, kernel: Any, folder: Path) -> None:
    storage(folder)["key"] = kernel
    whole = (path := _only_file(folder)).read_bytes()
    for part in (b"", whole[: len(whole) // 2], whole[:-100], bytes(len(whole))):
        path.write_bytes(part)
        later = storage(folder)
        with mock.patch.object(objects.logger, "warning") as warned:
            assert "key" not in later
        assert warned.call_args.args[1] == path
        later["key"] = kernel
        assert _only_file(folder).read_bytes() == whole
        assert "key" in storage(folder)


def test_a_disk_without_room_leaves_nothing_and_is_told(checked):
    checked(_fill_disk)


def _fill_disk(storage: Any, kernel: Any, folder: Path) -> None:
    class Large:
        ir_module = kernel.ir_module

        def export_to_c(self, object_file_path: str, function_name: str) -> None:
            Path(object_file_path).write_bytes(b"part")
            raise OSError(errno.ENOSPC, "No space left on device")

    kept = storage(folder)
    with mock.patch.object(cache.logger, "warning") as warned:
        kept["key"] = kept["other key"] = Large()
    assert warned.call_count == 1
    assert isinstance(kept["key"], Large)
    assert not list(folder.iterdir())
    assert cache.why_unkept().endswith("No space left on device")
    cache._warn_of.cache_clear()


def test_file_systems_without_locks_will_do(checked):
    checked(_refuse_locks)


def _refuse_locks(storage: Any, kernel: Any, folder: Path) -> None:
    with mock.patch.object(fcntl, "flock", side_effect=OSError(errno.ENOLCK, "No locks available")):
        storage(folder)["key"] = kernel
        assert "key" in storage(folder)


def test_host_code_asks_no_more_of_a_processor_than_all_have(checked):
    checked(_look_at_target)


def _look_at_target(storage: Any, kernel: Any, folder: Path) -> None:
    from cutlass._mlir._mlir_libs._cutlass_ir import _aot_support

    storage(folder)["key"] = kernel
    text = _aot_support.export_module_to_bytes(kernel.ir_module, format="ll").decode()
    attributes = dict(re.findall(r"^attributes (#\d+) = \{(.*)\}$", text, re.MULTILINE))
    defined = re.findall(r"^define .* (#\d+) ?\{$", text, re.MULTILINE)
    assert len(defined) == text.count("\ndefine ") > 0
    for each in defined:
        assert re.search(r'"target-cpu"="(x86-64|generic)" "target-features"(?!=)', attributes[each]), attributes[each]


def test_flash_attention_compiles_without_warnings_that_nobody_can_heed(tmp_path):
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert pool.submit(_warnings_of_a_backward_kernel, tmp_path).result() == []


def _warnings_of_a_backward_kernel(folder: Path) -> list[str]:
    import torch

    from magi_kernels_blackwell import FLASH_ATTENTION_4_BACKEND

    keep_in(folder)
    case = PrecompileCase("sm_90", torch.bfloat16, 8, 1, 128, 128, "backward", "full")
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always", UserWarning)
        assert FLASH_ATTENTION_4_BACKEND.precompile(case)
    return [str(each.message) for each in shown if each.category is UserWarning]
