# SPDX-License-Identifier: Apache-2.0
"""The compiled kernels hold the code that they must, for Hopper and for Blackwell; needs no GPU."""

import re
import subprocess
from collections import Counter

import pytest
import torch

from magi_comm_grpcoll import kernels
from magi_comm_grpcoll.combine import _NAMES, can_combine
from tests.sass import cuobjdump

NO_TOOL = "" if cuobjdump() else "there is no cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
pytestmark = pytest.mark.skipif(bool(kernels.missing_kernels() or NO_TOOL), reason=kernels.missing_kernels() or NO_TOOL)

ARCHS = ["sm_90", "sm_100"]
_FUNCTION = re.compile(r"^\s*Function : (\w+)$", re.MULTILINE)
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
_RESOURCES = re.compile(r"Function (\w+):\s*\n\s*REG:(\d+) STACK:(\d+)")


def dump(fatbin: str, *flags: str) -> str:
    path = kernels.FOLDER / f"{fatbin}.fatbin"
    return subprocess.run([str(cuobjdump()), *flags, str(path)], check=True, capture_output=True, text=True).stdout


def code(fatbin: str, arch: str) -> dict[str, Counter[str]]:
    """How often each kernel has each instruction."""
    _, *parts = _FUNCTION.split(dump(fatbin, "-sass", "-arch", arch))
    return {name: Counter(_INSTRUCTION.findall(body)) for name, body in zip(parts[::2], parts[1::2], strict=True)}


def count(instructions: Counter[str], prefix: str) -> int:
    return sum(number for name, number in instructions.items() if name.startswith(prefix))


@pytest.mark.parametrize("fatbin", kernels.FATBINS)
def test_there_is_code_for_hopper_and_blackwell_and_text_for_what_follows(fatbin):
    assert re.findall(r"(sm_\w+)\.cubin", dump(fatbin, "-lelf")) == ARCHS
    assert re.findall(r"(sm_\w+)\.ptx", dump(fatbin, "-lptx")) == ["sm_90"]


@pytest.mark.parametrize("fatbin", kernels.FATBINS)
@pytest.mark.parametrize("arch", ARCHS)
def test_nothing_spills_and_a_block_fits_beside_others(fatbin, arch):
    found = _RESOURCES.findall(dump(fatbin, "-res-usage", "-arch", arch))
    assert found
    for name, registers, stack in found:
        assert int(stack) == 0, name
        assert int(registers) <= 64, name


@pytest.mark.parametrize("arch", ARCHS)
def test_pushes_copy_in_bulk_and_tell_the_whole_system_last(arch):
    pushes = code("push_bulk", arch)
    assert set(pushes) == {"push_bulk"}
    for instructions in pushes.values():
        assert count(instructions, "UBLKCP") == 2  # one loads, one stores
        assert count(instructions, "MEMBAR") >= 2
        assert not count(instructions, "LDL") + count(instructions, "STL")
    words = code("push_words", arch)
    assert set(words) == {f"push_words_{width}" for width in (1, 2, 4, 8, 16)}
    assert count(words["push_words_16"], "ST.E.128") + count(words["push_words_16"], "STG.E.128") >= 4
    assert all(any("SYS" in name for name in instructions) for instructions in [*pushes.values(), *words.values()])


@pytest.mark.skipif(bool(kernels.missing_kernels(kernels.LINKED_FATBINS)), reason="put.fatbin is not there")
def test_puts_are_linked_with_nvshmem_for_hopper_and_blackwell():
    assert re.findall(r"(sm_\w+)\.cubin", dump("put", "-lelf")) == ARCHS
    for arch in ARCHS:
        symbols = dump("put", "-symbols", "-arch", arch)
        for name in ("put_signal", "tell_all", "see_arrived"):
            assert re.search(rf"ENTRY\s+{name}$", symbols, re.MULTILINE)
        # What NVSHMEM fills in when the code is loaded, IBGDA's part among it; nothing is left to be found elsewhere.
        for name in ("nvshmemi_device_state_d", "nvshmemi_ibgda_device_state_d", "nvshmemi_device_lib_version_d"):
            assert re.search(rf"\s{name}$", symbols, re.MULTILINE)
        assert "U_UNDEF" not in symbols
        found = {
            name: int(registers) for name, registers, _ in _RESOURCES.findall(dump("put", "-res-usage", "-arch", arch))
        }
        assert found["put_signal"] * 512 <= 1 << 16


@pytest.mark.parametrize("arch", ARCHS)
def test_every_pair_of_dtypes_has_kernels_that_read_16_bytes_at_a_time(arch):
    found = code("reduce", arch)
    for partial in _NAMES:
        for into in _NAMES:
            if not can_combine(partial, into):
                continue
            width = 8 if partial == into != torch.float32 else 4
            for what in ("add", "merge"):
                name = f"{what}_{_NAMES[partial]}_{_NAMES[into]}"
                assert f"{name}_1" in found
                assert count(found[f"{name}_{width}"], "LDG.E.128")
                assert not count(found[f"{name}_{width}"], "RED")
                assert not count(found[f"{name}_{width}"], "ATOM")
