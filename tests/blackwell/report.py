# SPDX-License-Identifier: Apache-2.0
"""The page of what the compiler made of every kernel."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

from magi_kernels_blackwell.wheels import CUDNN_FRONTEND, FLASH_ATTENTION
from tests.blackwell.matrix import Compiled
from tests.blackwell.rules import SOFTCAP_STACK_LIMITS, STACK_LIMITS, TENSOR_CORE, broken_rules, is_main
from tests.sass import Kernel, kernels_of

HEAD = """# Compiled kernels

The attention kernels that `magi-kernels-blackwell` can launch, as the compiler leaves them. `nox -s
compile_kernels` writes this page, on a machine without a GPU, with {wheels}.

```{{warning}}
**The kernels for sm_100 and sm_103 (Blackwell) have been compiled and their code has been checked. They have not
been run:** there was no such GPU. Nothing here says that their results are right, or how fast they are.
```

The checks: each kernel

- compiles to machine code,
- uses the tensor cores of its architecture ({tensor_cores}) and loads by TMA (`UTMALDG`),
- applies the bits of an irregular mask by `R2P`, but for cudnn_flex backward on sm_90, which tests them one by one,
- has no local memory (stack), so no spilled registers, but for at most {limits}.
  What holds for sm_100 holds for sm_103, of which a few kernels of every kind are compiled.

While FlashAttention-4's kernels are traced with one of our tables, it is asserted that bit i of a mask stands for
score i of a thread; for its forward pass on sm_100 that is the project's own promise.

{verdict}

Columns: *stack* in bytes per thread; *spills* are instructions that store to and load from local memory; *MMA*,
*UTMALDG*, *R2P* and *all* count instructions in the code. A case with two kernels has two rows. Kernels that
two cases share are listed with the first. A variant is a mask that the kernel knows itself, or an irregular one
if none is named, and options. The figure in *registers* is the kernel's launch figure: warps trade registers
later.
"""
COLUMNS = ("dtype", "heads", "head dim", "variant", "registers", "stack", "spills", "MMA", "UTMALDG", "R2P", "all")


def write_report(results: Sequence[Compiled], target: Path) -> int:
    """Write the page; returns how many cases failed or broke a rule, and prints why."""
    objects = [(done, obj) for done in results for obj in done.objects]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the work is in the disassembler's processes
        kernels = list(pool.map(kernels_of, (obj for _, obj in objects)))
    found = [(*each, kernel) for each, inside in zip(objects, kernels, strict=True) for kernel in inside]
    wrong = [(done, [done.error]) for done in results if done.error]
    wrong += [
        (done, rules)
        for done, obj, kernel in found
        if is_main(obj) and (rules := broken_rules(done.backend, done.case, kernel))
    ]
    for done, reasons in wrong:
        print(f"WRONG {done.backend} {done.case}: {'; '.join(reasons)}")
    main = [(done, kernel) for done, obj, kernel in found if is_main(obj)]
    small = [kernel for _, obj, kernel in found if not is_main(obj)]
    verdict = f"{len(results)} cases, {len(main)} attention kernels: " + (
        "all pass." if not wrong else f"**{len(wrong)} do not pass.**"
    )
    projects = {**FLASH_ATTENTION, **CUDNN_FRONTEND}
    page = HEAD.format(
        wheels=", ".join(f"{project} {version(project)}" for project in projects),
        tensor_cores=", ".join(f"`{name}` on {arch}" for arch, name in TENSOR_CORE.items()),
        limits=_limits(STACK_LIMITS) + " and, with softcap, " + _limits(SOFTCAP_STACK_LIMITS),
        verdict=verdict,
    )
    target.write_text(page + "".join(f"\n{part}\n" for part in _sections(main, small)))
    print(f"{verdict} See {target}.")
    return len(wrong)


def _limits(limits: dict[tuple[str, str, str], int]) -> str:
    return ", ".join(f"{limit} bytes in {' '.join(key)}" for key, limit in limits.items())


def _sections(main: list[tuple[Compiled, Kernel]], small: list[Kernel]) -> Iterator[str]:
    def section(each: tuple[Compiled, Kernel]) -> tuple[str, str, str]:
        return each[0].case.arch, each[0].backend, each[0].case.direction

    for (arch, backend, direction), group in groupby(sorted(main, key=section), key=section):
        rows = [COLUMNS, ["---"] * 4 + ["---:"] * (len(COLUMNS) - 4), *(_row(*each) for each in group)]
        yield f"## {arch}, {backend}, {direction}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)
    if small:
        yield (
            "## Smaller kernels\n\n"
            f"{len(small)} kernels prepare and finish backward passes and build plans of masks. They use up to "
            f"{max(each.registers for each in small)} registers and {max(each.stack for each in small)} bytes of stack."
        )


def _row(done: Compiled, kernel: Kernel) -> list[str]:
    case, count = done.case, kernel.instructions
    dims = f"{case.head_dim}" if case.head_dim == case.head_dim_v else f"{case.head_dim}/{case.head_dim_v}"
    return [
        str(case.dtype).removeprefix("torch."),
        f"{case.num_heads_q}/{case.num_heads_kv}",
        dims,
        case.variant,
        f"{kernel.registers}",
        f"{kernel.stack}",
        f"{count['STL'] + count['LDL']}",
        f"{count[TENSOR_CORE[case.arch]]}",
        f"{count['UTMALDG']}",
        f"{count['R2P']}",
        f"{kernel.size}",
    ]
