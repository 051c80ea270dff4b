# SPDX-License-Identifier: Apache-2.0
"""The kernels' machine code, looked at without a GPU."""

import os
import tarfile
import zlib
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from magi_kernels_hopper.driver import CUBINS
from magi_kernels_hopper.variants import BackwardVariant, IndexVariant, all_variants
from tests.sass import cuobjdump, kernels_of_cubin

HOOK = Path(__file__).parents[2] / "packages" / "kernels-hopper" / "hatch_build.py"


def build_hook() -> ModuleType:
    pytest.importorskip("hatchling", reason="the build hook needs hatchling: pip install hatchling")
    spec = spec_from_file_location("hopper_build", HOOK)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_a_compiler_the_message_says_what_to_do(monkeypatch):
    build = build_hook()
    monkeypatch.setattr(build, "nvcc_places", lambda: [])
    with pytest.raises(RuntimeError, match=r"install the CUDA toolkit .* MAGI_HOPPER_NO_KERNELS=1"):
        build.find_nvcc()


@pytest.mark.parametrize(("text", "is_on"), [("1", True), ("0", False), ("", False), ("false", False)])
def test_kernels_are_left_out_where_the_switch_is_1(monkeypatch, text, is_on):
    monkeypatch.setenv("MAGI_HOPPER_NO_KERNELS", text)
    assert build_hook().is_switched_off() == is_on


def test_without_a_compiler_the_build_asks_for_that_of_pypi(monkeypatch, tmp_path):
    build = build_hook()
    asked = build.KernelBuildHook.dependencies
    compiler = tmp_path / "nvcc"
    monkeypatch.setattr(build, "nvcc_places", lambda: [compiler])
    assert any(need.startswith("nvidia-cuda-nvcc==") for need in asked(None))
    monkeypatch.setenv("MAGI_HOPPER_NO_KERNELS", "1")
    assert asked(None) == []
    monkeypatch.delenv("MAGI_HOPPER_NO_KERNELS")
    compiler.touch()
    assert asked(None) == []


def test_unknown_kernels_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("MAGI_HOPPER_VARIANTS", "forward_d128_bf16,forward_d80_bf16")
    with pytest.raises(ValueError, match="there is no kernel forward_d80_bf16"):
        build_hook().compile_all(tmp_path, print)


def test_kernels_of_other_sources_are_not_shipped(monkeypatch, tmp_path):
    """Those that are no more, and those that were compiled before a source changed, also where others are asked for."""
    for name, seconds in (("forward_d128_bf16", 2**40), ("forward_d64_bf16", 1), ("forward_d80_bf16", 2**40)):
        (tmp_path / f"{name}.cubin").touch()
        os.utime(tmp_path / f"{name}.cubin", (seconds, seconds))
    monkeypatch.setenv("MAGI_HOPPER_VARIANTS", "forward_d128_bf16")
    build_hook().compile_all(tmp_path, print)
    assert [each.name for each in tmp_path.iterdir()] == ["forward_d128_bf16.cubin"]


def test_an_archive_of_the_sources_has_no_kernels_which_may_be_older(tmp_path):
    sdist = pytest.importorskip("hatchling.builders.sdist", reason="needs hatchling: pip install hatchling")
    (archive,) = sdist.SdistBuilder(str(HOOK.parent)).build(directory=str(tmp_path))
    with tarfile.open(archive) as opened:
        names = opened.getnames()
    assert any(name.endswith("csrc/forward/kernel.cuh") for name in names)
    assert not any("cubin/" in name for name in names)


@pytest.fixture(scope="module")
def cubins() -> Path:
    """The installed kernels, compiled again where their sources have changed and there is a compiler."""
    if cuobjdump() is None:
        pytest.skip("there is no cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    build = build_hook()
    try:
        build.find_nvcc()
    except RuntimeError as missing:
        if not all((CUBINS / f"{variant.name}.cubin").exists() for variant in all_variants()):
            pytest.skip(str(missing))
    else:
        build.compile_all(CUBINS, print)
    return CUBINS


STACK_LIMITS = {
    "backward_d96_bf16_softcap": 8,
    "backward_d128_bf16": 32,
    "backward_d192_v128_bf16": 16,
    "backward_d192_v128_bf16_softcap": 16,
    "backward_d192_bf16": 16,
    "backward_d192_bf16_softcap": 16,
    "backward_d256_bf16_softcap": 8,
    "forward_d64_bf16_softcap": 248,
    "forward_d192_v128_bf16_softcap": 16,
    "forward_d192_bf16_softcap": 40,
    "forward_d256_bf16_softcap": 64,
}
"""Bytes of local memory per thread that NOTES.md speaks of; none for all that is not listed."""


@pytest.mark.parametrize("variant", all_variants(), ids=lambda variant: variant.name)
def test_machine_code(cubins, variant):
    entries = [variant.entry]
    if isinstance(variant, BackwardVariant) and variant.fine:
        entries += [each.entry for each in variant.query_kernels]
    kernels = [each for each in kernels_of_cubin(cubins / f"{variant.name}.cubin") if each.name in entries]
    assert len(kernels) == len(entries)
    for kernel in kernels:
        assert kernel.instructions["HGMMA"]
        assert kernel.instructions["UTMALDG"]
        assert kernel.instructions["LDGSTS" if isinstance(variant, IndexVariant) else "R2P"]
        if isinstance(variant, BackwardVariant):
            # Generic stores, which ptxas emits where it can't tell that a pointer is to shared memory, are slow.
            assert not kernel.instructions["ST"]
        assert kernel.stack <= STACK_LIMITS.get(variant.name.replace("fp16", "bf16"), 0)


def test_wheel_stays_small(cubins):
    """A wheel holds the kernels compressed."""
    assert sum(len(zlib.compress(each.read_bytes())) for each in cubins.glob("*.cubin")) < 5 << 20
