# SPDX-License-Identifier: Apache-2.0
"""The backward kernels' own source on the host, against the dense float64 oracle.

Threads are fibers that take turns at random, and products are done as late as they may be or at once: what waits for
ever, is read too early or is written too soon is found without a GPU. What the copy engine's and the products' order in
memory allows beyond that is not.
"""

import ctypes
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import magi_kernels_hopper.backward as launcher
from magi_attention.common.slices import SliceTable
from magi_attention.kernels.protocol import AttentionCall
from magi_attention.testing.metric import assert_within_pytorch_error
from magi_attention.testing.oracle import dense_mask, masked_attention
from magi_attention.testing.stages import random_inputs
from magi_kernels_hopper.driver import Ready
from magi_kernels_hopper.variants import BackwardVariant

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "packages" / "kernels-hopper" / "csrc"
EMULATOR = Path(__file__).with_name("emulator")
COMPILER = shutil.which("g++")
PLACES = [*(Path(entry, "nvidia/cu13/include") for entry in sys.path), Path("/usr/local/cuda/include")]
HEADERS = next((place for place in PLACES if (place / "cuda_bf16.h").is_file() and (place / "cuda.h").is_file()), None)
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux" or COMPILER is None, reason="g++ compiles the emulator, on Linux"),
    pytest.mark.skipif(HEADERS is None, reason="CUDA's headers are needed"),
]

BLOCKS = 2
ELEMENTS = {"bf16": torch.bfloat16, "fp16": torch.float16}
VARIANTS = [
    BackwardVariant(128, 128, "bf16", False),
    BackwardVariant(128, 128, "bf16", False, fine=True),
    BackwardVariant(96, 96, "fp16", False, fine=True),
    BackwardVariant(96, 96, "fp16", True),
    BackwardVariant(192, 128, "bf16", False),
]
# Rows without keys, rows with several intervals, keys that nobody sees, ragged ends.
IRREGULAR = [[0, 100, 0, 150, 0], [100, 290, 50, 250, 1], [300, 310, 150, 170, 3], [300, 310, 0, 20, 2]]
BLOCKS_OF_64 = [
    [64 * q, 64 * q + 64, 64 * k, 64 * k + 64, 0] for q, k in ((0, 0), (0, 3), (1, 2), (3, 0), (4, 0), (4, 2))
]
DOCUMENTS = [[0, 60, 0, 60, 1], [60, 100, 60, 100, 0], [100, 300, 100, 300, 1]]
ASM = re.compile(r"__device__ __forceinline__ [^\n]*\{\n(?:(?!\n\}\n)[\s\S])*?\basm\b[\s\S]*?\n\}\n")


def host_source(folder: Path) -> None:
    """Put a copy of csrc there, in which what is PTX is the emulator's."""
    shutil.copytree(CSRC, folder)
    for path in (folder / "ptx").iterdir():
        path.write_text('#include "matrices.h"\n')
    arithmetic = folder / "arithmetic.cuh"
    arithmetic.write_text(
        ASM.sub("", arithmetic.read_text()).replace("#pragma once", '#pragma once\n#include "arithmetic.h"')
    )
    memory = "extern __shared__ __align__(1024) uint8_t memory[];"
    for name in ("kernel.cuh", "queries.cuh"):
        kernel = folder / "backward" / name
        assert memory in kernel.read_text()
        kernel.write_text(
            kernel.read_text().replace(memory, "uint8_t* const memory = emulator::current->block->shared;")
        )


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda variant: variant.name)
def emulated(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulated")
    host_source(folder / "csrc")
    defines = [f"-D{name}={value}" for name, value in request.param.defines.items()]
    includes = [f"-I{folder / 'csrc'}", f"-I{EMULATOR}", f"-isystem{HEADERS}"]
    command = [COMPILER, "-std=c++20", "-O2", "-fPIC", "-shared", "-w", *includes, *defines]
    subprocess.run([*command, str(EMULATOR / "backward.cpp"), "-o", str(folder / "kernel.so")], check=True)
    return request.param, ctypes.CDLL(str(folder / "kernel.so"))


class Kernel:
    """Takes the place of ``driver.Kernel``."""

    def __init__(self, function, late: bool) -> None:
        self._function, self._late, self._seed = function, late, 0
        function.restype = ctypes.c_bool

    def launch_ready(self, blocks: int, stream: int, ready: Ready) -> None:
        self._seed += 1
        assert self._function(ctypes.byref(ready.params), blocks, self._seed, self._late), "it failed or waits for ever"


class Map(ctypes.Structure):
    """``magi::ptx::Map`` of the emulator."""

    _fields_ = (("data", ctypes.c_void_p), ("sizes", ctypes.c_int64 * 5), ("box", ctypes.c_int * 3))


def tensor_map(x, box, swizzle_bytes):
    encoded = Map(x.data_ptr(), (*x.shape, x.stride(0), x.stride(1)), box)
    return bytes(encoded).ljust(128, b"\0")


@pytest.fixture
def on_host(monkeypatch):
    """Let the launcher take tensors of the host; the counters must be zero at the end."""
    zeros = torch.zeros(4, dtype=torch.int32)
    monkeypatch.setattr(launcher, "multiprocessors", lambda device: BLOCKS)
    monkeypatch.setattr(launcher, "tensor_maps", lambda device: SimpleNamespace(get=tensor_map))
    monkeypatch.setattr(launcher, "StreamsOfTables", lambda tables: SimpleNamespace(add_current=lambda: None))
    monkeypatch.setattr(launcher, "counters", lambda device, stream: zeros)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)  # not in CPU builds
    yield monkeypatch
    assert not zeros.any()


@pytest.mark.parametrize(
    ("num_q", "num_k", "heads", "rows", "deterministic", "late"),
    [
        (310, 310, (4, 1), IRREGULAR, False, True),
        (300, 300, (2, 1), DOCUMENTS, True, False),
        (90, 260, (2, 2), [[0, 90, 0, 260, 1]], False, True),
        (320, 256, (4, 1), BLOCKS_OF_64, False, False),
        (100, 100, (7, 1), [[0, 60, 0, 60, 1], [60, 100, 30, 100, 3]], True, True),
    ],
    ids=["irregular", "documents", "long context", "blocks", "seven heads"],
)
def test_emulated(emulated, on_host, num_q, num_k, heads, rows, deterministic, late):
    check(emulated, on_host, num_q, num_k, heads, rows, deterministic, late)


@pytest.mark.parametrize(
    ("num_q", "num_k", "heads", "rows", "awaited"),
    [
        (300, 300, (4, 1), DOCUMENTS, ((0, 70), (250, 260))),
        (310, 310, (2, 2), IRREGULAR, ((200, 310),)),
        (90, 600, (4, 2), [[0, 90, 0, 300, 0]], ((290, 600),)),  # half of them seen by nobody
        (100, 200, (2, 1), [[0, 100, 0, 200, 0]], ((0, 200),)),
    ],
    ids=["two runs", "irregular", "unseen", "all"],
)
def test_awaited_keys_are_there_when_it_is_told(emulated, on_host, num_q, num_k, heads, rows, awaited):
    """Once for each launch, and not before all of them are written, though the launch is not over."""
    library, seen, told, word = emulated[1], [], [], torch.zeros(1, dtype=torch.int32)
    library.emulate_watch.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]

    def watch(gradients):
        for gradient in gradients[1:]:
            gradient.fill_(torch.nan)
            seen.append(torch.zeros_like(gradient))
            library.emulate_watch(gradient.data_ptr(), seen[-1].data_ptr(), gradient.nbytes)

    launch = launcher.PreparedBackward.launch

    def watched(self, call, inputs, gradients, *others):
        watch(gradients)
        launch(self, call, inputs, gradients, *others)

    on_host.setattr(launcher.PreparedBackward, "launch", watched)
    on_host.setattr(
        launcher,
        "bell",
        lambda device, stream: SimpleNamespace(
            lock=nullcontext(), address=word.data_ptr(), count_launch=lambda: "there"
        ),
    )
    try:
        _, *of_keys = check(
            emulated, on_host, num_q, num_k, heads, rows, False, True, awaited, lambda *x: told.append(x)
        )
    finally:
        library.emulate_watch_nothing()
    assert word.item() == 1
    (told_keys,) = told
    assert told_keys[2:] == ("there",)
    for at_that_time, gradient, given in zip(seen, of_keys, told_keys, strict=False):
        assert given is gradient
        for start, stop in awaited:
            assert torch.equal(at_that_time[start:stop], gradient[start:stop])


def check(emulated, on_host, num_q, num_k, heads, rows, deterministic, late, awaited=(), keys_done=None):
    """The gradients, which are no further from the oracle's than twice PyTorch's."""
    variant, library = emulated
    kernels = launcher._Kernels(
        Kernel(library.emulate_prepare, late),
        Kernel(library.emulate_backward, late),
        tuple(Kernel(getattr(library, each.entry), late) for each in variant.query_kernels if variant.fine),
    )
    on_host.setattr(launcher, "_kernels", lambda variant, device: kernels)
    on_host.setattr(launcher, "backward_variants", lambda dims, element, softcap: [variant])
    dims, dtype = (variant.head_dim, variant.head_dim_v), ELEMENTS[variant.element]
    x = random_inputs(num_q, num_k, heads=heads, dims=dims, dtype=dtype, device="cpu")
    slices, scale, softcap = SliceTable(rows), dims[0] ** -0.5, 3.0 if variant.softcap else 0.0
    mask = dense_mask(slices, num_q, num_k, "cpu")

    def dense(dtype):
        leaves = [each.to(dtype).requires_grad_() for each in (x.q, x.k, x.v)]
        out, lse, _ = masked_attention(*leaves, mask, softmax_scale=scale, softcap=softcap)
        return out.detach(), lse.detach(), torch.autograd.grad((out * x.dout.to(dtype)).sum(), leaves)

    out, lse, expected = dense(torch.float64)
    _, _, plain = dense(dtype)
    call = AttentionCall(slices, scale, softcap, deterministic, first_keys=awaited)
    lse = lse.float().T.contiguous().T if late else lse.float()  # as others lay it out, or as the forward kernel does
    got = launcher.launch_backward(x.dout, x.q, x.k, x.v, out.to(dtype), lse, None, call, keys_done)
    for name, a, b, c in zip(("dq", "dk", "dv"), got, expected, plain, strict=True):
        assert_within_pytorch_error(a, b, c, name=name)
    return got
