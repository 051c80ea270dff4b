# SPDX-License-Identifier: Apache-2.0
"""The kernels' machine code, looked at without a GPU."""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from magi_kernels_hopper.variants import ForwardVariant, all_variants, compiler_options
from tests.sass import cuobjdump, kernels_of_cubin

PACKAGE = Path(__file__).parents[2] / "packages" / "kernels-hopper"


def find_nvcc() -> str | None:
    spec = spec_from_file_location("hopper_build", PACKAGE / "hatch_build.py")
    module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError:
        pytest.skip("hatchling, which the build hook is for, is not installed", allow_module_level=True)
    try:
        return module.find_nvcc()
    except RuntimeError:
        return None


NVCC = find_nvcc()
NEEDED = {"nvcc: install the CUDA toolkit": NVCC, "cuobjdump: pip install nvidia-cuda-cuobjdump": cuobjdump()}
MISSING = "; ".join(f"there is no {what}" for what, found in NEEDED.items() if not found)
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

STACK_LIMITS: dict[str, int] = {}
"""Bytes of local memory per thread that NOTES.md justifies, by kernel; none for all that is not listed."""

# The element types differ in a few letters of the product's instruction; every kernel in one of them is compiled.
VARIANTS = [each for each in all_variants() if each.element == "bf16"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cubin")

    def compile_one(variant: ForwardVariant):
        cubin = folder / f"{variant.name}.cubin"
        command = [NVCC, *compiler_options(variant), PACKAGE / "csrc" / variant.source, "-o", cubin]
        return variant.name, subprocess.run(command, capture_output=True, text=True), cubin

    with ThreadPoolExecutor(2) as pool:
        return {name: (done, cubin) for name, done, cubin in pool.map(compile_one, VARIANTS)}


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_machine_code(compiled, variant):
    done, cubin = compiled[variant.name]
    assert not done.returncode, done.stderr
    # Products that wait for each other, or registers that are not exchanged: the compiler says so and goes on.
    assert "serialized" not in done.stdout + done.stderr
    assert "setmaxnreg" not in done.stdout + done.stderr
    (kernel,) = kernels_of_cubin(cubin)
    assert kernel.name == variant.entry
    assert kernel.instructions["HGMMA"]
    assert kernel.instructions["UTMALDG"]
    assert kernel.stack <= STACK_LIMITS.get(variant.name, 0)
