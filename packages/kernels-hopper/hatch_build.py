# SPDX-License-Identifier: Apache-2.0
"""Compiles the kernels when the wheel is built: csrc/ to one cubin for each entry of variants.py.

``MAGI_HOPPER_NO_KERNELS=1`` builds without them, for work on other parts where there is no compiler; the backend then
answers that it has no kernels. ``MAGI_HOPPER_VARIANTS=forward_d128_bf16,…`` compiles just those.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = Path(__file__).parent
KERNELS = "src/magi_kernels_hopper/cubin"
SLOW = ("C7508", "C7510", "C7512", "C7514", "serialized")
"""What ptxas notes when it gives up what a kernel is built on: exchanged registers, products that overlap."""

TAG = "py3-none-manylinux_2_28_x86_64.manylinux_2_28_aarch64"
"""Machine code for the GPU alone: hosts of both kinds (GH200's are aarch64) take the same wheel."""

NVCC_WHEELS = [f"nvidia-{name}==13.0.*" for name in ("cuda-nvcc", "nvvm", "cuda-crt", "cuda-runtime", "cuda-cccl")]
"""The CUDA compiler of PyPI, with all that it needs."""


class KernelBuildHook(BuildHookInterface):
    """Compiles what is missing or older than its sources."""

    def dependencies(self) -> list[str]:
        """Ask for PyPI's nvcc where the machine has none."""
        return [] if is_switched_off() or any(place.is_file() for place in nvcc_places()) else NVCC_WHEELS

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and mark the wheel as one for Linux."""
        build_data["tag"], build_data["pure_python"] = TAG, False
        if is_switched_off():
            self.app.display_warning("MAGI_HOPPER_NO_KERNELS is set: the wheel has no kernels")
            return
        compile_all(PACKAGE / KERNELS, self.app.display_info)
        build_data["artifacts"].append(f"{KERNELS}/*.cubin")


def is_switched_off() -> bool:
    """Whether the environment asks for a package without kernels."""
    return os.environ.get("MAGI_HOPPER_NO_KERNELS", "").strip() == "1"


def compile_all(target: Path, say: Any) -> None:
    """Compile the variants into ``target``, as many at a time as there are processors."""
    variants = read_variants()
    wanted = variants.all_variants()
    if chosen := os.environ.get("MAGI_HOPPER_VARIANTS"):
        names = set(chosen.split(","))
        if unknown := names - {each.name for each in wanted}:
            raise ValueError(f"MAGI_HOPPER_VARIANTS: there is no kernel {', '.join(sorted(unknown))}")
        wanted = [each for each in wanted if each.name in names]
    sources = [
        PACKAGE / "src/magi_kernels_hopper/variants.py",
        *(p for p in (PACKAGE / "csrc").rglob("*") if p.is_file()),
    ]
    newest = max(path.stat().st_mtime for path in sources)
    remove_outdated(target, {f"{each.name}.cubin" for each in variants.all_variants()}, newest)
    cubins = {target / f"{each.name}.cubin": each for each in wanted}
    missing = [path for path in cubins if not path.exists()]
    if not missing:
        return
    nvcc = find_nvcc()
    target.mkdir(exist_ok=True)
    say(f"compiling {len(missing)} kernels with {nvcc}")
    with ThreadPoolExecutor(os.process_cpu_count() if sys.version_info >= (3, 13) else os.cpu_count()) as pool:
        for path in pool.map(lambda path: compile_one(nvcc, variants, cubins[path], path), missing):
            say(f"compiled {path.name}")


def remove_outdated(target: Path, names: set[str], newest: float) -> None:
    """Remove what is no kernel of these sources, or older than they are: the wheel has all that is there."""
    for path in target.glob("*.cubin"):
        if path.name not in names or path.stat().st_mtime < newest:
            path.unlink()


def compile_one(nvcc: str, variants: ModuleType, variant: Any, target: Path) -> Path:
    """Compile one variant; what the compiler has to complain about is in the error."""
    part = target.with_suffix(".part")
    command = [nvcc, *variants.compiler_options(variant), str(PACKAGE / "csrc" / variant.source), "-o", str(part)]
    done = subprocess.run(command, capture_output=True, text=True)
    said = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"nvcc could not compile {variant.name}:\n{' '.join(command)}\n{said}")
    if slow := [line for line in said.splitlines() if any(code in line for code in SLOW)]:
        raise RuntimeError(f"nvcc compiled {variant.name} to something slow:\n" + "\n".join(slow))
    part.replace(target)
    return target


def nvcc_places() -> list[Path]:
    """Where the CUDA compiler may be: CUDA_HOME, the path, /usr/local/cuda, the wheel nvidia-cuda-nvcc."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    places = [Path(home) / "bin" / "nvcc" for home in homes if home]
    if on_path := shutil.which("nvcc"):
        places.append(Path(on_path))
    return [*places, Path("/usr/local/cuda/bin/nvcc"), *(Path(entry, "nvidia/cu13/bin/nvcc") for entry in sys.path)]


def find_nvcc() -> str:
    """Find the CUDA compiler.

    Raises:
        RuntimeError: If there is none; says what to do.
    """
    for place in nvcc_places():
        if place.is_file():
            return str(place)
    raise RuntimeError(
        "magi-kernels-hopper is built with the CUDA compiler, and no nvcc was found: install the CUDA toolkit 12.8 or "
        "newer, or set CUDA_HOME to where it is. MAGI_HOPPER_NO_KERNELS=1 builds the package without its kernels."
    )


def read_variants() -> ModuleType:
    """Import variants.py by its path: the package's own imports are not there while a wheel is built."""
    path = PACKAGE / "src" / "magi_kernels_hopper" / "variants.py"
    spec = spec_from_file_location("magi_kernels_hopper_variants", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
