# SPDX-License-Identifier: Apache-2.0
"""What the host takes to launch one distributed attention: ``python benchmarks/host_time.py``. Needs no GPU.

Kernels that only allocate their results stand in for attention, and a process group that sends nothing for NCCL. What
is left is our own Python and PyTorch's dispatch of small tensors on a CPU: microseconds per call in the steady state,
the median of many calls. On a GPU come events and streams and what the kernels' libraries take to launch; see
``benchmarks/distributed.py --host-time`` for those together.

magi/N      our calc_attn and its backward pass by autograd, with N remote stages; "kept" with rows kept for backward.
gather      the peer: two all-gathers and the kernel, a reduce-scatter of gradients; without autograd.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from context_parallel import AllGather, Kernel
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from magi_attention.api import calc_attn, magi_attn_flex_key
from magi_attention.common import AttnMaskType, AttnRanges, workloads
from magi_attention.common.enum import AttnRole
from magi_attention.config import DispatchConfig, DistAttnConfig, OverlapConfig, RuntimeConfig
from magi_attention.kernels.protocol import AttentionCall, AttentionRequest, AttentionResult, Support
from magi_attention.kernels.registry import installed_backends
from magi_attention.runtime.cache import dist_attn_runtime_dict_mgr, find_manager

TOKENS, CHUNK, HEAD_DIM = 512, 64, 16
MASKS = ("causal", "varlen_causal")

Passes = tuple[Callable[[], Tensor], Callable[[Tensor], object]]


class NoKernels:
    """A kernel backend that computes nothing."""

    name = "reference"

    def supports(self, request: AttentionRequest) -> Support:
        """Everything."""
        return Support(True)

    def expected_tflops(self, request: AttentionRequest) -> float:
        """More than any other."""
        return 1e9

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> AttentionResult:
        """Allocate the results."""
        lse = torch.empty_strided(q.shape[:2], (1, q.shape[0]), dtype=torch.float32)
        return AttentionResult(q.new_empty(*q.shape[:2], v.shape[2]), lse)

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: object) -> tuple[Tensor, Tensor, Tensor]:
        """Allocate the gradients."""
        return torch.empty_like(q), q.new_empty(k.shape), q.new_empty(v.shape)


def tensors(rows: int, heads: tuple[int, int]) -> list[Tensor]:
    """q, k, v and dout."""
    return [torch.randn(rows, h, HEAD_DIM).bfloat16() for h in (heads[0], heads[1], heads[1], heads[0])]


def magi(mask: str, ranks: int, degree: int, keep: bool) -> Passes:
    """Our passes."""
    heads = (16 * ranks, 1) if keep else (8, 2)
    rows = workloads.make(mask, TOKENS * ranks).rows.tolist()
    config = DistAttnConfig(
        dispatch_config=DispatchConfig(chunk_size=CHUNK),
        overlap_config=OverlapConfig(degree=degree, min_chunk_size=CHUNK),
        runtime_config=RuntimeConfig(kernel_backend="reference", check_plan=False, keep_received=keep),
    )
    key = magi_attn_flex_key(
        AttnRanges.from_ranges([row[:2] for row in rows]),
        AttnRanges.from_ranges([row[2:4] for row in rows]),
        [AttnMaskType.from_int_type(row[4]) for row in rows],
        TOKENS * ranks,
        TOKENS * ranks,
        *heads,
        HEAD_DIM,
        pad_size=0,
        cp_group_or_mesh=dist.group.WORLD,
        dist_attn_config=config,
    )
    *leaves, dout = tensors(find_manager(key).num_local_rows(AttnRole.QUERY), heads)
    q, k, v = (x.requires_grad_() for x in leaves)
    return lambda: calc_attn(q, k, v, key)[0], lambda out: torch.autograd.grad(out, (q, k, v), dout)


def gather(mask: str, ranks: int) -> Passes:
    """The peer's passes."""
    q, k, v, dout = tensors(TOKENS, (8, 2))
    method = AllGather(Kernel(q, k, v, "reference"), workloads.make(mask, TOKENS * ranks), TOKENS * ranks, "zigzag")
    return lambda: method.forward(q, k, v), lambda _: method.backward(dout)


def microseconds(passes: Passes, repeat: int) -> tuple[float, float]:
    """The medians of both passes."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeat):
        start = time.perf_counter()
        out = passes[0]()
        middle = time.perf_counter()
        passes[1](out)
        times[0].append(middle - start)
        times[1].append(time.perf_counter() - middle)
    forward, backward = (statistics.median(each[len(each) // 4 :]) * 1e6 for each in times)
    return forward, backward


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8], help="sizes of the group; this is rank 0")
    parser.add_argument("--masks", nargs="+", choices=sorted(workloads.WORKLOADS), default=MASKS)
    parser.add_argument("--repeat", type=int, default=300)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    installed_backends()["reference"] = NoKernels()
    print("microseconds of the host per call")
    print(f"{'ranks':>5}  {'mask':24}{'method':16}{'forward':>9}{'backward':>10}{'/ gather':>10}{'/ gather':>10}")
    for ranks in arguments.ranks:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
        for mask in arguments.masks:
            peer = microseconds(gather(mask, ranks), arguments.repeat)
            rows = {"gather": peer}
            for name, degree, keep in (("magi/0", 0, False), ("magi/1", 1, False), ("magi/1 kept", 1, True)):
                rows[name] = microseconds(magi(mask, ranks, degree, keep), arguments.repeat)
            rows["magi/2"] = microseconds(magi(mask, ranks, 2, False), arguments.repeat)
            for name, (forward, backward) in rows.items():
                print(f"{ranks:>5}  {mask:24}{name:16}{forward:>9.0f}{backward:>10.0f}", end="")
                print(f"{forward / peer[0]:>10.2f}{backward / peer[1]:>10.2f}", flush=True)
        dist_attn_runtime_dict_mgr.clear()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
