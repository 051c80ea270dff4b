# SPDX-License-Identifier: Apache-2.0
"""The kernels of cudnn.flex_attention, compiled ahead of time; those that build plans as well."""

from typing import Any
from unittest import mock

import torch
from torch import Tensor

from magi_attention.kernels.protocol import PrecompileCase
from magi_kernels_blackwell.cases import arch_number, call_of, tensors_of
from magi_kernels_blackwell.compiling import compiling_for, planning_for
from magi_kernels_blackwell.cudnn_flex import launch, library
from magi_kernels_blackwell.wheels import HOPPER

VARIANTS = ("", "deterministic")
"""What most trainings launch. The forward pass is always deterministic."""


def compile_case(case: PrecompileCase) -> bool:
    """Compile a case into the cache on disk, in a fresh process; returns False if the cache had all of it."""
    arch, backward = arch_number(case.arch), case.direction == "backward"
    with compiling_for(arch) as compiler:
        loaded, x, call = library.load_for(arch), tensors_of(case), call_of(case)
        builder = loaded.builder
        with (
            planning_for(arch),
            mock.patch.object(builder, "_build_forward_schedule", wraps=builder._build_forward_schedule) as planned,
        ):
            if backward:
                launch.launch_backward(loaded, x.dout, x.q, x.k, x.v, x.out, x.lse, x.dlse, call)
            else:
                launch.launch_forward(loaded, x.q, x.k, x.v, call)
        for scheduled in planned.call_args_list:
            with library.quiet(loaded):
                _compile_plan_kernels(builder, arch, scheduled.args[0], backward, case.head_dim == 256)
    return compiler.count > 0


def _compile_plan_kernels(builder: Any, arch: int, config: Any, backward: bool, has_256_dims: bool) -> None:
    """Compile the kernels that ``create_mask_plan`` leaves out where nothing is launched.

    They read shapes when they run, so that tensors of any size will do.
    """

    def ints(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    def bits() -> Tensor:
        return ints(1, 4, 4, dtype=torch.uint32)

    counts, offsets, sections = ints(1, 4), ints(5), ints(4)
    cost, invalid = ints(4, dtype=torch.int64), ints(1, dtype=torch.uint32)
    histogram, work = ints(4, 4), ints(4, 4)
    bits_of_keys = (bits(), bits(), *(counts,) * 4) if backward else (None,) * 6
    builder._compile_plan_workspace_init(arch, bits(), bits(), counts, counts, invalid, histogram, cost, *bits_of_keys)
    tables = (counts, counts, offsets, offsets)
    of_keys, of_dq = (
        tables if there else (None,) * 4 for there in (backward, backward and has_256_dims and arch != HOPPER)
    )
    header = ints(9, dtype=torch.int64)
    builder._compile_fixed_scan_header(arch, *tables, *of_keys, *of_dq, invalid, header)
    sequences = ints(4, 8) if has_256_dims and arch != HOPPER else None
    builder._compile_forward_schedule(config, counts, counts, None, None, None, sequences, work, sections, sections)
    builder._compile_forward_schedule_order(
        config, work, sections, sections, histogram, cost, sections, sections, sections, work, None
    )
