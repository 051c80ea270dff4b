# SPDX-License-Identifier: Apache-2.0
"""What is in a compiled kernel: registers, stack, spills and instructions, read with NVIDIA's disassembler."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

ELF, CUDA_MACHINE = b"\x7fELF", 190
COUNTED = ("HGMMA", "UTCHMMA", "UTMALDG", "R2P", "STL", "LDL")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T0-9]+\s+)?([A-Z][A-Z0-9_]*)", re.MULTILINE)
_RESOURCES = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)")


@dataclass(frozen=True)
class Kernel:
    """A GPU function.

    Attributes:
        name: its mangled name.
        registers: per thread, where threads don't trade them.
        stack: bytes per thread of local memory, for spilled registers and others.
        instructions: how often each is in the code, without modifiers.
    """

    name: str
    registers: int
    stack: int
    instructions: Counter[str]

    @property
    def size(self) -> int:
        """How many instructions it has."""
        return self.instructions.total()


@cache
def cuobjdump() -> Path | None:
    """NVIDIA's disassembler of the wheel nvidia-cuda-cuobjdump, else of Triton; None without either."""
    nvidia, triton = find_spec("nvidia"), find_spec("triton")
    roots = [Path(root) for spec in (nvidia, triton) if spec for root in spec.submodule_search_locations or ()]
    found = (path for root in roots for path in sorted(root.rglob("bin/cuobjdump")))
    return next(found, None)


def kernels_of(obj: Path) -> list[Kernel]:
    """The GPU functions in an object file of the host."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(_cubin(obj.read_bytes(), obj))
        return kernels_of_cubin(cubin)


def kernels_of_cubin(cubin: Path) -> list[Kernel]:
    """The GPU functions in a cubin."""
    found = _RESOURCES.findall(_dump("-res-usage", cubin))
    code = re.split(r"^\s*Function : ", _dump("-sass", cubin), flags=re.MULTILINE)[1:]
    bodies = {text.split(None, 1)[0]: text for text in code}
    assert bodies
    return [
        Kernel(name, int(registers), int(stack), Counter(_INSTRUCTION.findall(bodies[name])) - Counter(NOP=10**9))
        for name, registers, stack in found
    ]


def _cubin(content: bytes, obj: Path) -> bytes:
    """The ELF of the GPU inside the ELF of the host."""
    start = content.find(ELF, 1)
    while start > 0:
        if int.from_bytes(content[start + 18 : start + 20], "little") == CUDA_MACHINE:
            return content[start:]
        start = content.find(ELF, start + 1)
    raise ValueError(f"{obj} holds no GPU code")


def _dump(flag: str, cubin: Path) -> str:
    return subprocess.run([str(cuobjdump()), flag, str(cubin)], check=True, capture_output=True, text=True).stdout
