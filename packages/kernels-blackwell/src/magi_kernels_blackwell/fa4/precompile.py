# SPDX-License-Identifier: Apache-2.0
"""FlashAttention-4's kernels, compiled ahead of time."""

from magi_attention.kernels.protocol import PrecompileCase
from magi_kernels_blackwell.cases import arch_number, call_of, tensors_of
from magi_kernels_blackwell.compiling import compiling_for, multiprocessors_of
from magi_kernels_blackwell.fa4 import launch, library

_MASKS = ("", "full", "causal", "window", "documents full", "documents causal", "documents window")
VARIANTS = (*_MASKS, *(f"{mask} deterministic".strip() for mask in _MASKS))
"""What most trainings launch. The forward pass is always deterministic."""


def compile_case(case: PrecompileCase) -> bool:
    """Compile a case into the cache on disk, in a fresh process; returns False if the cache had all of it."""
    arch = arch_number(case.arch)
    with compiling_for(arch, case.multiprocessors) as compiler:
        num_sms = multiprocessors_of(arch, case.multiprocessors)
        loaded, x, call = library.load_for(arch, num_sms), tensors_of(case), call_of(case)
        if case.direction == "forward":
            launch.launch_forward(loaded, arch, x.q, x.k, x.v, call)
        else:
            launch.launch_backward(loaded, arch, x.dout, x.q, x.k, x.v, x.out, x.lse, x.dlse, call)
    return compiler.count > 0
