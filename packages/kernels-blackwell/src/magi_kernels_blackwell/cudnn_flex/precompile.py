# SPDX-License-Identifier: Apache-2.0
"""The kernels of cudnn.flex_attention, compiled ahead of time; those that build plans as well."""

from magi_attention.kernels.protocol import PrecompileCase
from magi_kernels_blackwell.cases import arch_number, call_of, tensors_of
from magi_kernels_blackwell.compiling import compiling_for, planning_for
from magi_kernels_blackwell.cudnn_flex import launch, library

VARIANTS = ("", "deterministic")
"""What most trainings launch. The forward pass is always deterministic."""


def compile_case(case: PrecompileCase) -> bool:
    """Compile a case into the cache on disk, in a fresh process; returns False if the cache had all of it."""
    arch = arch_number(case.arch)
    with compiling_for(arch) as compiler:
        loaded, x, call = library.load_for(arch), tensors_of(case), call_of(case)
        with planning_for(arch):
            if case.direction == "forward":
                launch.launch_forward(loaded, x.q, x.k, x.v, call)
            else:
                launch.launch_backward(loaded, x.dout, x.q, x.k, x.v, x.out, x.lse, x.dlse, call)
    return compiler.count > 0
