# SPDX-License-Identifier: Apache-2.0
"""Compile the CUDA kernels of this package to fatbins while hatchling builds it."""

import os
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SETTING = "MAGI_GRPCOLL_NO_KERNELS"
CUDA = "13.0.*"
NVCC_WHEELS = [f"nvidia-{name}=={CUDA}" for name in ("cuda-nvcc", "nvvm", "cuda-crt", "cuda-runtime", "cuda-cccl")]
# Code of Hopper and of Blackwell, and PTX for what comes later.
TARGETS = ("arch=compute_90,code=sm_90", "arch=compute_100,code=sm_100", "arch=compute_90,code=compute_90")
# Sources that are linked with NVSHMEM's device code, of which there is no PTX. Later host libraries load it too.
LINKED = ("put",)
NVSHMEM_WHEEL = "nvidia-nvshmem-cu13==3.4.5"


class FatbinHook(BuildHookInterface):
    """Run nvcc for every fatbin that is older than the sources, or than this file, which says how.

    A fatbin whose source is gone is removed: the wheel has all that are there.
    """

    def dependencies(self) -> list[str]:
        """Ask for NVSHMEM, and for PyPI's nvcc where the machine has none."""
        if is_switched_off():
            return []
        return [NVSHMEM_WHEEL, *([] if shutil.which("nvcc") else ["cuda-pathfinder>=1.5", *NVCC_WHEELS])]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile. The wheel holds no code for the host's processor, so it serves every machine."""
        if is_switched_off():
            self.app.display_warning(f"{SETTING} is set: no kernels are compiled, all-to-all is used instead")
            return
        root = Path(self.root)
        output = root / self.config["output"]
        output.mkdir(parents=True, exist_ok=True)
        newest = max(path.stat().st_mtime for path in (root / "hatch_build.py", *root.glob("csrc/*")))
        sources = {output / f"{source.stem}.fatbin": source for source in sorted(root.glob("csrc/*.cu"))}
        for fatbin in output.glob("*.fatbin"):
            if fatbin not in sources or fatbin.stat().st_mtime < newest:
                fatbin.unlink()
        for fatbin, source in sources.items():
            if not fatbin.exists():
                compile_fatbin(source, fatbin)
        build_data["artifacts"].append(f"{self.config['output']}/*.fatbin")

    def clean(self, versions: list[str]) -> None:
        """Remove what was compiled."""
        shutil.rmtree(Path(self.root, self.config["output"]), ignore_errors=True)


def is_switched_off() -> bool:
    """Whether the environment asks for a package without kernels."""
    return os.environ.get(SETTING, "").strip() == "1"


def compile_fatbin(source: Path, fatbin: Path) -> None:
    """Compile one source for all targets."""
    targets: list[str | Path] = [f"-gencode={target}" for target in TARGETS]
    if source.stem in LINKED:
        found = nvshmem()
        targets = [*targets[:-1], "-rdc=true", "-dlink", "-cudadevrt=none"]
        targets += [f"-I{found}/include", f"-L{found}/lib", "-lnvshmem_device"]
    command = [nvcc(), "-fatbin", "-std=c++17", "-O3", *targets]
    print(f"nvcc {source.name} -> {fatbin.name}", flush=True)
    subprocess.run([*command, "-o", fatbin, source], check=True)


def nvcc() -> str:
    """The compiler on PATH, else that of the build's own environment."""
    if found := shutil.which("nvcc"):
        return found
    from cuda.pathfinder import find_nvidia_binary_utility

    if found := find_nvidia_binary_utility("nvcc"):
        return str(found)
    raise RuntimeError(f"nvcc is not on PATH: install the CUDA toolkit {CUDA[:-2]}, or set {SETTING}=1 to go without")


def nvshmem() -> Path:
    """The folder of NVSHMEM's wheel, a build requirement, which builds without isolation don't check."""
    name, wanted = NVSHMEM_WHEEL.split("==")
    try:
        installed = version(name)
    except PackageNotFoundError:
        installed = "none"
    if installed != wanted:
        raise RuntimeError(
            f"the kernels are linked with NVSHMEM {wanted}, and {installed} is installed: "
            f"pip install {NVSHMEM_WHEEL}, or set {SETTING}=1 to go without kernels"
        )
    return Path(distribution(name).locate_file("nvidia/nvshmem"))
