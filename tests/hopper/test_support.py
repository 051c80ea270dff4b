# SPDX-License-Identifier: Apache-2.0
"""What the backend answers where it cannot compute; needs no GPU."""

import ctypes
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from magi_attention.common.slices import SliceTable
from magi_attention.kernels.protocol import AttentionCall, AttentionRequest, KernelBackend
from magi_attention.kernels.registry import choose_backend, installed_backends
from magi_kernels_hopper import (
    BACKEND,
    backward_params,
    backward_queries,
    driver,
    index,
    index_backward,
    index_lists,
    support,
)
from magi_kernels_hopper.forward import Params, geometry
from magi_kernels_hopper.variants import (
    BACKWARD_SIZES,
    FINE_SIZES,
    FORWARD_SIZES,
    HEAD_DIMS,
    ForwardVariant,
    IndexVariant,
    all_variants,
)

GPU = torch.device("cuda", 0)
REQUEST = AttentionRequest(torch.device("cpu"), torch.bfloat16, 8, 2, 128, 128)


def test_backend_is_found_by_its_entry_point():
    assert isinstance(BACKEND, KernelBackend)
    assert installed_backends()["hopper"] is BACKEND


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "NVIDIA GPUs only"),
        ({"direction": "backward"}, "NVIDIA GPUs only"),
        ({"dtype": torch.float32}, "NVIDIA GPUs only"),
        ({"device": GPU, "dtype": torch.float32}, "not in torch.float32; use the backend 'flex'"),
        ({"device": GPU, "dtype": torch.float64}, "not in torch.float64; use the backend 'reference'"),
        ({"device": GPU, "head_dim": 80, "head_dim_v": 80}, "head dims are 80/80"),
        ({"device": GPU, "head_dim": 64, "head_dim_v": 128}, "kernels are for 64, 96, 128, 192/128, 192, 256"),
    ],
)
def test_refusals_say_why(changes, reason):
    with pytest.raises(RuntimeError, match=reason):
        choose_backend(replace(REQUEST, **changes), "hopper")


@pytest.mark.parametrize("there", ["nothing", "a module of that name", "another package of that name"])
def test_without_cuda_bindings_it_refuses_whatever_else_is_named_cuda(there, monkeypatch, tmp_path):
    """As where a script's folder has a ``cuda.py``; a GPU and all kernels are pretended."""
    for name in [each for each in sys.modules if each.split(".")[0] == "cuda"]:
        monkeypatch.delitem(sys.modules, name)
    if there == "nothing":
        monkeypatch.setitem(sys.modules, "cuda", None)
    else:
        path = tmp_path / ("cuda.py" if there == "a module of that name" else "cuda/__init__.py")
        path.parent.mkdir(exist_ok=True)
        path.touch()
        monkeypatch.syspath_prepend(str(tmp_path))
    driver._driver.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(Path, "exists", lambda path: True)
    support._support_of.cache_clear()
    try:
        answer = BACKEND.supports(replace(REQUEST, device=torch.device("cuda", 0)))
    finally:
        driver._driver.cache_clear()
        support._support_of.cache_clear()
    assert not answer
    assert "cuda-bindings cannot be imported" in answer.reason
    assert "pip install 'cuda-bindings>=13,<14'" in answer.reason


@pytest.mark.parametrize(
    ("direction", "compiled", "missing"),
    [
        ("forward", [], "forward_d128_bf16"),
        ("forward", ["forward_d128_bf16"], "forward_d128_bf16_tall"),
        ("backward", ["backward_d128_bf16"], "backward_d128_bf16_fine"),
    ],
)
def test_a_kernel_that_was_not_compiled_is_named(direction, compiled, missing, monkeypatch, tmp_path):
    """A GPU is pretended."""
    for name in compiled:
        (tmp_path / f"{name}.cubin").touch()
    monkeypatch.setattr(support, "CUBINS", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    support._support_of.cache_clear()
    try:
        answer = BACKEND.supports(replace(REQUEST, device=torch.device("cuda", 0), direction=direction))
    finally:
        support._support_of.cache_clear()
    assert not answer
    assert f"has no kernel {missing}: it was not compiled" in answer.reason


def test_its_other_name():
    with pytest.raises(RuntimeError, match="NVIDIA GPUs only"):
        choose_backend(REQUEST, "ffa")


def test_automatic_choice_passes_it_over():
    assert choose_backend(REQUEST).name == "reference"


def test_computing_with_it_gives_the_reason():
    q, k = torch.zeros(5, 2, 128, dtype=torch.bfloat16), torch.zeros(5, 1, 128, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="NVIDIA GPUs only"):
        BACKEND.forward(q, k, k, AttentionCall(SliceTable([]), 1.0))
    with pytest.raises(RuntimeError, match="NVIDIA GPUs only"):
        BACKEND.backward(q, q, k, k, q, q[..., 0].float(), None, AttentionCall(SliceTable([]), 1.0))


def test_a_driver_that_cannot_load_kernels_is_named(monkeypatch):
    def answer(*values: object) -> Callable[..., tuple[object, ...]]:
        return lambda *_: values

    old = SimpleNamespace(
        CUresult=SimpleNamespace(CUDA_SUCCESS=0),
        cuLibraryLoadFromFile=answer(200, None),
        cuGetErrorName=answer(0, b"CUDA_ERROR_INVALID_IMAGE"),
        cuGetErrorString=answer(0, b"device kernel image is invalid"),
        cuDriverGetVersion=answer(0, 12080),
    )
    monkeypatch.setattr(driver, "_driver", lambda: old)
    with pytest.raises(RuntimeError, match=r"INVALID_IMAGE.*some\.cubin.*is for CUDA 12\.8.*install driver 580"):
        driver.Kernel(Path("some.cubin"), "entry", 0, 128, 0)


def test_parameters_have_the_size_that_the_kernel_asserts():
    assert ctypes.sizeof(Params) == 768
    assert Params.results.offset == 4 * 128
    assert ctypes.sizeof(index.Params) == 384
    assert index.Params.results.offset == 128 + ctypes.sizeof(index_lists.Lists)
    assert ctypes.sizeof(index_backward.Params) == 512
    assert index_backward.Params.lists.offset == 2 * 128
    assert ctypes.sizeof(backward_params.Params) == 768
    assert backward_params.Params.dk.offset == 4 * 128
    assert ctypes.sizeof(backward_queries.Params) == 896
    assert backward_queries.Params.row_terms.offset == ctypes.sizeof(Params)


def test_every_kernel_fits_a_multiprocessor():
    assert set(FORWARD_SIZES) == set(BACKWARD_SIZES) == set(HEAD_DIMS)
    assert len({each.name for each in all_variants()}) == len(all_variants())
    for sizes in [*BACKWARD_SIZES.values(), *FINE_SIZES.values()]:
        assert sizes.shared_bytes <= 227 * 1024
    for variant in all_variants():
        if isinstance(variant, IndexVariant):
            sizes = variant.sizes
            assert sizes.blocks * (variant.shared_bytes + 1024) <= 228 * 1024
            assert sizes.blocks * 128 * (sizes.consumer_registers + sizes.producer_registers) <= 1 << 16
        if not isinstance(variant, ForwardVariant):
            continue
        sizes = variant.sizes
        assert variant.shared_bytes <= 227 * 1024
        # A block starts with as many for each of its threads, in steps of 8.
        registers = (1 << 16) // sizes.threads // 8 * 8 * (sizes.consumers + 1)
        assert sizes.consumers * sizes.consumer_registers + sizes.producer_registers <= registers


@pytest.mark.parametrize(
    ("heads", "pack", "share_q", "num_packs"),
    [
        ((8, 8), 1, 64, 8),
        ((64, 8), 8, 8, 8),
        ((6, 2), 3, 21, 2),
        ((28, 4), 7, 9, 4),
        ((40, 8), 5, 12, 8),
        ((12, 2), 6, 10, 2),
        ((64, 1), 8, 8, 8),
    ],
)
def test_heads_share_tiles(heads, pack, share_q, num_packs):
    cut = geometry(ForwardVariant(128, 128, "bf16"), *heads, num_k=1 << 20)
    assert (cut.pack, cut.share_q, cut.num_packs) == (pack, share_q, num_packs)
    assert cut.packs_per_kv_head * heads[1] == num_packs
    assert cut.packs_per_section == cut.packs_per_kv_head


def test_expected_speed():
    """Grouped heads on irregular masks are what the forward kernels are best at."""
    grouped = replace(REQUEST, mask_class="varlen_full")
    assert BACKEND.expected_tflops(grouped) > BACKEND.expected_tflops(replace(grouped, num_heads_kv=8))
    assert BACKEND.expected_tflops(grouped) > BACKEND.expected_tflops(grouped.toward("backward"))
    assert BACKEND.expected_tflops(grouped) > BACKEND.expected_tflops(replace(grouped, head_dim=64, head_dim_v=64))


@pytest.mark.parametrize(("num_pairs", "wins"), [(8192 * 8193 // 2, True), (16384 * 16385 // 2, False), (None, False)])
def test_short_causal_masks_are_faster_here_than_elsewhere_backward(num_pairs, wins):
    blackwell = pytest.importorskip("magi_kernels_blackwell")
    request = AttentionRequest(torch.device("cpu"), torch.bfloat16, 64, 8, 128, 128, mask_class="causal")
    request = replace(request, num_pairs=num_pairs).toward("backward")
    assert (BACKEND.expected_tflops(request) > blackwell.FLASH_ATTENTION_4_BACKEND.expected_tflops(request)) == wins
    for other in ({"head_dim": 64, "head_dim_v": 64}, {"dtype": torch.float16}, {"softcap": True}):
        another = replace(request, **other)
        assert BACKEND.expected_tflops(another) == BACKEND.expected_tflops(replace(another, num_pairs=None))


def test_what_is_kept_of_answers_does_not_grow_with_masks():
    request = AttentionRequest(torch.device("cpu"), torch.bfloat16, 64, 8, 128, 128)
    support._support_of.cache_clear()
    for number, name in product(range(5), ("causal", "full")):
        support.support_of(replace(request, mask_class=name, num_pairs=number))
    assert support._support_of.cache_info().currsize == 1
