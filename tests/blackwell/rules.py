# SPDX-License-Identifier: Apache-2.0
"""What must hold for the code of a compiled kernel."""

from pathlib import Path

from magi_attention.kernels.protocol import PrecompileCase
from magi_kernels_blackwell.cases import NATIVE_MASKS
from tests.sass import Kernel

MAIN = ("fwd", "bwd", "magi_grouped_bwd")
"""The folders of attention kernels; the other objects prepare and finish their work."""

STACK_LIMITS = {
    ("fa4", "sm_100", "forward"): 72,
    ("fa4", "sm_100", "backward"): 32,
    ("cudnn_flex", "sm_100", "forward"): 32,
    ("cudnn_flex", "sm_100", "backward"): 48,
}
"""Bytes of local memory per thread, by backend, architecture and direction; none for all that is not listed.

Limits of sm_100 are those of sm_103, too.
"""

SOFTCAP_STACK_LIMITS = {
    ("fa4", "sm_90", "backward"): 152,
    ("fa4", "sm_100", "forward"): 80,
    ("fa4", "sm_100", "backward"): 392,
}
"""The same with softcap, for which both passes keep more values per score."""

SMALL_STACK_LIMIT = 8
"""Bytes for the kernels around them: one that orders the work of a plan on sm_100 spills a value, once a mask."""

TENSOR_CORE = {"sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_103": "UTCHMMA"}

TESTS_BITS_OTHERWISE = ("cudnn_flex", "sm_90", "backward")
"""These kernels apply masks without ``R2P``."""


def is_main(obj: Path) -> bool:
    """Whether an object holds attention kernels."""
    return obj.parent.name in MAIN


def broken_rules(backend: str, case: PrecompileCase, kernel: Kernel) -> list[str]:
    """Say what is wrong with an attention kernel: what it must use but does not, and too much local memory."""
    required = [TENSOR_CORE[case.arch], "UTMALDG"]
    natively_masked = set(case.variant.split()) & set(NATIVE_MASKS)
    if not natively_masked and (backend, case.arch, case.direction) != TESTS_BITS_OTHERWISE:
        required.append("R2P")
    wrong = [f"has no {each}" for each in required if not kernel.instructions[each]]
    limits = SOFTCAP_STACK_LIMITS if "softcap" in case.variant else STACK_LIMITS
    allowed = limits.get((backend, case.arch.replace("sm_103", "sm_100"), case.direction), 0)
    if kernel.stack > allowed:
        wrong.append(f"uses {kernel.stack} bytes of stack per thread, {allowed} are allowed")
    return wrong
