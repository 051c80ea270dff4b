# SPDX-License-Identifier: Apache-2.0
"""What the backends say of themselves: which requests they serve, how fast, what they compile."""

import tomllib
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from magi_attention.common.slices import SliceTable
from magi_attention.kernels.mask_class import MASK_CLASSES
from magi_attention.kernels.protocol import (
    AttentionCall,
    AttentionRequest,
    KernelBackend,
    KernelSelection,
    PrecompileCase,
    Precompiles,
)
from magi_attention.kernels.registry import choose_backend, installed_backends
from magi_attention.testing.stages import random_inputs
from magi_kernels_blackwell import CUDNN_FLEX_BACKEND, FLASH_ATTENTION_4_BACKEND, cache, support, wheels
from magi_kernels_blackwell.cases import NATIVE_MASKS, SHORT_LENGTH, call_of, request_of
from magi_kernels_blackwell.compiling import Compiler, multiprocessors_of
from magi_kernels_blackwell.fa4.library import folder_of
from magi_kernels_blackwell.masks import packed_mask

FA4, CUDNN = FLASH_ATTENTION_4_BACKEND, CUDNN_FLEX_BACKEND
of_each_backend = pytest.mark.parametrize("backend", [FA4, CUDNN], ids=lambda backend: backend.name)
ROOT = Path(__file__).parents[2]
PINNED = wheels.FLASH_ATTENTION | wheels.CUDNN_FRONTEND
NO_CUDNN = wheels.missing_wheels(tuple(wheels.CUDNN_FRONTEND.items()))
PLAIN = AttentionRequest(torch.device("cuda"), torch.bfloat16, 8, 2, 128, 128)


def asked(dims: tuple[int, int] = (128, 128), heads: tuple[int, int] = (8, 2), **changes) -> AttentionRequest:
    return replace(PLAIN, head_dim=dims[0], head_dim_v=dims[1], num_heads_q=heads[0], num_heads_kv=heads[1], **changes)


@pytest.fixture
def machine(monkeypatch):
    """Pretend to be a machine: machine(capability, versions of wheels)."""

    def pretend(capability: int, versions: dict[str, str] | None = None) -> None:
        known = PINNED if versions is None else versions

        def version(project: str) -> str:
            if project not in known:
                raise wheels.PackageNotFoundError(project)
            return known[project]

        monkeypatch.setattr(wheels, "version", version)
        monkeypatch.setattr(wheels, "find_spec", lambda module: object())
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability > 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: divmod(capability, 10))
        clear()

    def clear() -> None:
        wheels.missing_wheels.cache_clear()
        wheels.capability_of.cache_clear()

    yield pretend
    clear()


def test_wheels_are_pinned_as_the_package_requires_them():
    project = tomllib.loads((ROOT / "packages/kernels-blackwell/pyproject.toml").read_text())["project"]
    pinned = dict(need.split("==") for need in project["dependencies"] if "==" in need)
    assert {name.split("[")[0]: version for name, version in pinned.items()} == PINNED


def test_backends_are_found_by_their_entry_points():
    for name, backend in (("blackwell", FA4), ("cudnn_flex", CUDNN)):
        assert installed_backends()[name] is backend
        assert backend.name == name
        assert isinstance(backend, KernelBackend)
        assert isinstance(backend, Precompiles)


@of_each_backend
@pytest.mark.parametrize("capability", [90, 100, 103])
def test_supported_machines(machine, backend, capability):
    machine(capability)
    assert backend.supports(PLAIN)
    assert backend.supports(replace(PLAIN, dtype=torch.float16, direction="backward"))


@of_each_backend
@pytest.mark.parametrize("capability", [80, 89, 120])
def test_other_gpus_are_refused(machine, backend, capability):
    machine(capability)
    answer = backend.supports(PLAIN)
    assert not answer
    assert f"compute capability {capability / 10}" in answer.reason
    assert "9.0 Hopper" in answer.reason


@of_each_backend
def test_what_no_gpu_can_help(machine, backend):
    machine(90)
    for dtype, other in ((torch.float32, "flex"), (torch.float64, "reference")):
        answer = backend.supports(replace(PLAIN, dtype=dtype))
        assert not answer
        assert answer.reason.endswith(f"not in {dtype}; use the backend '{other}'")
        answer = backend.supports(replace(PLAIN, dtype=dtype, device=torch.device("cpu")))
        assert not answer
        assert "on cpu" in answer.reason
    machine(0)
    assert backend.supports(PLAIN).reason == "no CUDA device is available"
    assert choose_backend(replace(PLAIN, device=torch.device("cpu"))).name == "reference"


@of_each_backend
def test_a_wheel_whose_path_python_does_not_read_is_named(machine, backend, monkeypatch):
    """As in a folder of ``pip install --target`` that PYTHONPATH names."""
    machine(90)
    monkeypatch.setattr(wheels, "find_spec", lambda module: None if module == "cutlass" else object())
    answer = backend.supports(PLAIN)
    assert not answer
    assert answer.reason.startswith("nvidia-cutlass-dsl is installed, but Python finds no module cutlass")
    assert answer.reason.endswith("install it there: pip install 'nvidia-cutlass-dsl==4.8.1'")


@of_each_backend
def test_missing_and_unfit_wheels_are_named(machine, backend):
    machine(90, {})
    answer = backend.supports(PLAIN)
    assert not answer
    assert answer.reason.endswith("is not installed: pip install 'magi-attention[blackwell]'")
    machine(90, dict.fromkeys(PINNED, "0.0.1"))
    assert "0.0.1 is installed, needed is" in backend.supports(PLAIN).reason
    case = PrecompileCase("sm_90", torch.bfloat16, 8, 2, 128, 128, "forward")
    with pytest.raises(RuntimeError, match="is installed, needed is"):
        backend.precompile(case)


# Head dims of queries and keys, of values -> architectures whose kernels take them forward, and backward (grouped).
FA4_DIMS = {
    (64, 64): ({90, 100, 103}, {90, 100, 103}),
    (96, 96): ({90, 100, 103}, {90, 100, 103}),
    (128, 128): ({90, 100, 103}, {90, 100, 103}),
    (192, 128): ({90, 100, 103}, {90, 100, 103}),
    (192, 192): ({90}, {90}),
    (256, 256): ({90, 100, 103}, {90}),
    (32, 32): (set(), set()),
    (128, 64): (set(), set()),
    (512, 512): (set(), set()),
}
CUDNN_DIMS = {(8, 128): True, (64, 64): True, (72, 40): True, (128, 128): True, (192, 128): True, (256, 256): True}
CUDNN_DIMS |= {(4, 4): False, (100, 100): False, (136, 136): False, (192, 192): False, (256, 128): False}


@pytest.mark.parametrize("arch", [90, 100, 103])
def test_head_dims(arch):
    for dims, served in FA4_DIMS.items():
        for direction, archs in zip(("forward", "backward"), served, strict=True):
            answer = FA4.supports_on(arch, asked(dims, direction=direction))
            assert bool(answer) == (arch in archs), (dims, direction, answer)
            assert answer or answer.reason
    for dims, served in CUDNN_DIMS.items():
        for direction in ("forward", "backward"):
            answer = CUDNN.supports_on(arch, asked(dims, (8, 8), direction=direction))
            assert bool(answer) == served, (dims, direction, answer)
            assert answer or str(dims) in answer.reason


def test_grouped_heads_of_latent_attention_have_no_backward_pass_on_hopper_by_cudnn():
    assert CUDNN.supports_on(90, asked((192, 128), (8, 8), direction="backward"))
    assert CUDNN.supports_on(90, asked((192, 128), (8, 2), direction="forward"))
    assert FA4.supports_on(90, asked((192, 128), (8, 2), direction="backward"))
    refused = CUDNN.supports_on(90, asked((192, 128), (8, 2), direction="backward"))
    assert not refused
    assert "'blackwell'" in refused.reason


def test_backward_passes_of_unequal_head_dims_on_hopper_by_cudnn():
    for dims, heads in (((72, 40), (8, 2)), ((64, 128), (8, 8)), ((56, 104), (8, 8))):
        assert CUDNN.supports_on(90, asked(dims, heads))
        assert CUDNN.supports_on(100, asked(dims, heads, direction="backward"))
        refused = CUDNN.supports_on(90, asked(dims, heads, direction="backward"))
        assert not refused
        assert str(dims) in refused.reason
        assert "'flex'" in refused.reason
    assert CUDNN.supports_on(90, asked((72, 40), (8, 8), direction="backward"))
    assert CUDNN.supports_on(90, asked((72, 72), (8, 2), direction="backward"))


@pytest.mark.skipif(bool(NO_CUDNN), reason=NO_CUDNN)
@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (6, 2), (8, 1)], ids=str)
def test_head_dims_on_hopper_are_those_that_cudnn_itself_says(heads):
    from cudnn.flex_attention.kernels.sm90.bwd.backward_config import sm90_native_bwd_can_implement
    from cudnn.flex_attention.kernels.sm90.fwd.forward_config import sm90_native_fwd_can_implement

    for dims in (*product(range(8, 129, 8), repeat=2), (192, 128), (256, 256)):
        assert bool(CUDNN.supports_on(90, asked(dims, heads))) == sm90_native_fwd_can_implement(*dims), dims
        served = CUDNN.supports_on(90, asked(dims, heads, direction="backward"))
        assert bool(served) == sm90_native_bwd_can_implement(*dims, *heads), dims


def test_gradients_of_lse_for_256_dims_on_blackwell_are_refused(machine):
    machine(100)
    call = AttentionCall(SliceTable([[0, 4, 0, 4, 0]]), 1.0)
    x = random_inputs(4, 4, heads=(2, 2), dims=(256, 256), dtype=torch.bfloat16)
    lse = torch.zeros(4, 2)
    with pytest.raises(RuntimeError, match=r"which qo_comm always asks for.*kernel_backend_backward='flex'"):
        CUDNN.backward(x.dout, x.q, x.k, x.v, x.v, lse, lse, call)


@pytest.mark.parametrize("arch", [90, 100, 103])
def test_options(arch):
    assert FA4.supports_on(arch, asked(softcap=True))
    assert "'blackwell'" in CUDNN.supports_on(arch, asked(softcap=True)).reason
    assert CUDNN.supports_on(arch, asked(max_logits=True))
    assert "'cudnn_flex'" in FA4.supports_on(arch, asked(max_logits=True)).reason
    for backend, direction in product((FA4, CUDNN), ("forward", "backward")):
        served = not (backend is FA4 and direction == "backward" and arch == 90)
        answer = backend.supports_on(arch, asked(deterministic=True, direction=direction))
        assert bool(answer) == served
        assert served or "not deterministic" in answer.reason


@of_each_backend
def test_speeds(machine, backend):
    """Figures are positive, dense masks are faster than irregular ones, and Blackwell is faster than Hopper."""
    machine(90)
    for direction in ("forward", "backward"):
        speeds = {
            each: backend.expected_tflops(replace(PLAIN, mask_class=each, direction=direction)) for each in MASK_CLASSES
        }
        assert min(speeds.values()) > 0
        dense = [speeds.pop("full"), speeds.pop("causal")]
        assert min(dense) > max(speeds.values())
    assert backend.expected_tflops(asked((64, 64))) < backend.expected_tflops(PLAIN)
    hopper = backend.expected_tflops(PLAIN)
    machine(100)
    assert backend.expected_tflops(PLAIN) > hopper


def test_the_faster_backend_is_expected_to_be(machine):
    """As measured on Hopper, by mask class; windows of 64 dims differ."""
    machine(90)
    fa4_forward = {"full", "causal"}
    fa4_backward = {"full", "causal", "varlen_full", "varlen_causal", "sliding_window", "block_causal"}
    for direction, fa4 in (("forward", fa4_forward), ("backward", fa4_backward)):
        for each in MASK_CLASSES:
            request = replace(PLAIN, mask_class=each, direction=direction)
            faster = FA4.expected_tflops(request) > CUDNN.expected_tflops(request)
            assert faster == (each in fa4), (each, direction)
    window = replace(asked((64, 64)), mask_class="sliding_window", direction="backward")
    assert FA4.expected_tflops(window) < CUDNN.expected_tflops(window)
    assert FA4.expected_tflops(window.toward("forward")) > CUDNN.expected_tflops(window.toward("forward"))


@of_each_backend
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_head_dims_are_given_figures_of_one_gpu(machine, backend, direction):
    """Other backends are compared by them too: no class of masks may gain by head dims what others lose by them."""
    machine(90)
    for dim in (64, 96, 256):
        shares = [
            backend.expected_tflops(replace(asked((dim, dim)), mask_class=each, direction=direction))
            / backend.expected_tflops(replace(PLAIN, mask_class=each, direction=direction))
            for each in MASK_CLASSES
        ]
        assert max(shares) < 1
        assert max(shares) < 1.2 * min(shares)


@of_each_backend
def test_cases_to_compile_are_what_is_supported(backend):
    dims = ((64, 64), (128, 128), (192, 128), (192, 192), (256, 256), (512, 512))
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    for arch in ("sm_90", "sm_100", "sm_103"):
        cases = backend.precompile_cases(KernelSelection(arch, dtypes, ((8, 8), (8, 2)), dims))
        assert len(set(cases)) == len(cases) > 0
        assert {case.arch for case in cases} == {arch}
        assert {case.direction for case in cases} == {"forward", "backward"}
        assert {case.dtype for case in cases} == set(support.DTYPES)
        assert all(backend.supports_on(int(arch[3:]), request_of(case)) for case in cases)
    assert not backend.precompile_cases(KernelSelection("sm_80", dtypes, ((8, 8),), dims))
    forward = backend.precompile_cases(KernelSelection("sm_100", (torch.float16,), ((8, 8),), dims, ("forward",)))
    assert {case.direction for case in forward} == {"forward"}
    assert not any("deterministic" in case.variant for case in forward)


def test_cases_are_of_the_multiprocessors_that_were_asked_for():
    for number, expected in ((None, 148), (152, 152)):
        asked_for = KernelSelection("sm_100", (torch.bfloat16,), ((8, 8),), ((64, 64),), multiprocessors=number)
        (count,) = {case.multiprocessors for case in FA4.precompile_cases(asked_for)}
        assert count == number
        assert multiprocessors_of(100, count) == expected
    assert folder_of(100, 148) != folder_of(100, 152)
    assert folder_of(90, 114) == folder_of(90, 132)


@of_each_backend
def test_a_kernel_that_was_compiled_but_is_not_kept_is_an_error(machine, monkeypatch, backend):
    machine(0)
    case = PrecompileCase("sm_90", torch.bfloat16, 8, 8, 64, 64, "forward")
    monkeypatch.setattr(cache, "_unkept", [])
    for was_compiled in (True, False):
        monkeypatch.setattr(type(backend), "compile_case", lambda self, case, answer=was_compiled: answer)
        assert backend.precompile(case) is was_compiled
    cache.cannot_keep("No space left on device")
    assert backend.precompile(case) is False
    monkeypatch.setattr(type(backend), "compile_case", lambda self, case: True)
    with pytest.raises(RuntimeError, match=r"kernels cannot be kept in .*: No space left on device"):
        backend.precompile(case)
    with pytest.raises(RuntimeError, match="No space left on device"):
        Compiler(print)("nothing is compiled in vain")


@of_each_backend
def test_kernels_that_its_project_does_not_keep_are_an_error_of_one_backend(machine, monkeypatch, backend):
    machine(0)
    case = PrecompileCase("sm_90", torch.bfloat16, 8, 8, 64, 64, "forward")
    monkeypatch.setattr(cache, "_unkept", [])
    monkeypatch.setattr(type(backend), "compile_case", lambda self, case: True)
    own = f"{backend.variable_prefix}_CUTE_DSL_CACHE_ENABLED"
    for each in (FA4, CUDNN):
        monkeypatch.setenv(f"{each.variable_prefix}_CUTE_DSL_CACHE_ENABLED", "0")
    with pytest.raises(RuntimeError, match=f"{own} is '0': unset it"):
        backend.precompile(case)
    monkeypatch.delenv(own)
    assert backend.precompile(case)


def test_cases_launch_the_kernels_that_they_name():
    def call(variant: str) -> AttentionCall:
        return call_of(PrecompileCase("sm_90", torch.bfloat16, 8, 2, 128, 128, "forward", variant))

    def packed(slices: SliceTable):
        length = int(slices.rows[:, 1].max())
        return packed_mask(slices, length, length)

    assert packed(call("").slices) is None
    assert packed(call("short").slices) is None
    assert call("short").slices.rows.max() <= SHORT_LENGTH
    found = {mask: packed(call(mask).slices) for mask in NATIVE_MASKS}
    assert all(mask is not None and mask.num_documents == 1 for mask in found.values())
    limits = {mask: (each.left is None, each.right) for mask, each in found.items()}
    assert limits["full"] == (True, None)
    assert limits["causal"] == (True, 0)
    assert limits["window"] == (False, 0)
    assert limits["left_window"] == (False, None)
    assert limits["right_window"][0]
    assert limits["right_window"][1] > 0
    for mask in NATIVE_MASKS:
        assert packed(call(f"documents {mask}").slices).num_documents == 2
    options = call("causal softcap deterministic max_logits")
    assert options.softcap > 0
    assert options.deterministic
    assert options.max_logits
