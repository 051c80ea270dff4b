# SPDX-License-Identifier: Apache-2.0
"""A few kernels of every kind compiled to machine code for Hopper and Blackwell, and looked at; needs no GPU.

``nox -s compile_kernels`` does the same with all kernels.
"""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from magi_attention.kernels.protocol import PrecompileCase
from magi_kernels_blackwell.wheels import CUDNN_FRONTEND, FLASH_ATTENTION, missing_wheels
from tests.blackwell import matrix
from tests.blackwell.rules import SMALL_STACK_LIMIT, broken_rules, is_main
from tests.sass import cuobjdump, kernels_of

MISSING = missing_wheels(tuple((FLASH_ATTENTION | CUDNN_FRONTEND).items()))
NO_TOOL = "" if cuobjdump() else "there is no cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
pytestmark = pytest.mark.skipif(bool(MISSING or NO_TOOL), reason=MISSING or NO_TOOL)

CASES = matrix.short_matrices()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(scope="module")
def compiled(cache):
    return {(done.backend, done.case): done for done in matrix.compile_matrix(CASES, cache)}


@pytest.mark.parametrize(("backend", "case"), CASES, ids=str)
def test_kernel(compiled, backend, case):
    done = compiled[backend, case]
    assert not done.error, done.error
    attention = [kernel for obj in done.objects if is_main(obj) for kernel in kernels_of(obj)]
    assert attention
    assert not [wrong for kernel in attention for wrong in broken_rules(backend, case, kernel)]


def test_smaller_kernels_do_not_spill(compiled):
    small = [obj for done in compiled.values() for obj in done.objects if not is_main(obj)]
    assert {"bwd_pre", "bwd_post"} <= {obj.parent.name for obj in small}
    assert not [obj for obj in small for kernel in kernels_of(obj) if kernel.stack > SMALL_STACK_LIMIT]


@pytest.mark.parametrize("backend", matrix.BACKENDS)
def test_compiled_kernels_are_found_again(compiled, cache, backend):
    """In another process, and those of each architecture."""
    for case in (case for name, case in CASES if name == backend and not case.variant and case.head_dim == 128):
        before = set(cache.rglob("*.o"))
        with ProcessPoolExecutor(1, get_context("spawn"), matrix.keep_in, (cache,)) as pool:
            assert pool.submit(matrix.BACKENDS[backend].precompile, case).result() is False
        assert set(cache.rglob("*.o")) == before


def test_positions_of_scores_are_asserted_while_tracing(cache):
    """The assertions pass for what the tensor cores' layouts are, as the kernels above compile, and fail for others."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert pool.submit(rejected_positions).result() == [False, True, False, True]


def rejected_positions() -> list[bool]:
    from magi_kernels_blackwell.fa4 import masks

    class Coordinates:
        """Of a thread's scores, in one line; as rows of a matrix on SM90, as a list on SM100."""

        def __init__(self, positions: list[int]) -> None:
            self.positions = positions

        def __getitem__(self, index):
            return (0, self.positions[index[1] if isinstance(index, tuple) else index])

    pairs_of_eight = [i // 2 * 8 + i % 2 for i in range(32)]
    turns_of_32 = [i // 32 * 64 + i % 32 for i in range(64)]

    def rejects(check) -> bool:
        try:
            check()
        except AssertionError:
            return True
        return False

    return [
        rejects(lambda: masks._check_positions_sm90(Coordinates(pairs_of_eight), 32)),
        rejects(lambda: masks._check_positions_sm90(Coordinates(list(range(32))), 32)),
        rejects(lambda: masks._check_positions_sm100(Coordinates(turns_of_32), 1, 32, 64)),
        rejects(lambda: masks._check_positions_sm100(Coordinates(list(range(64))), 1, 32, 64)),
    ]


def test_unknown_architectures_are_refused():
    from magi_kernels_blackwell.compiling import compiling_for

    with pytest.raises(ValueError, match="arch must be one of"), compiling_for(80):
        pass
    case = PrecompileCase("sm_80", torch.bfloat16, 8, 2, 128, 128, "forward")
    with pytest.raises(ValueError, match="not 80"):
        matrix.BACKENDS["fa4"].precompile(case)
