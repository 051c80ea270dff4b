# SPDX-License-Identifier: Apache-2.0
"""One distributed attention through the public API, as every rank runs it, and the dense oracle's answer to it."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from magi_attention.api import calc_attn, dispatch, magi_attn_flex_key, undispatch
from magi_attention.common import AttnMaskType, AttnRanges
from magi_attention.common.enum import AttnRole
from magi_attention.common.slices import SliceTable
from magi_attention.config import DistAttnConfig
from magi_attention.testing.metric import assert_within_pytorch_error
from magi_attention.testing.oracle import dense_attention, dense_mask, masked_attention


@dataclass(frozen=True)
class Case:
    """What to compute; picklable, so that it can be sent to the ranks. With ``total_k`` it is a cross-attention."""

    total: int
    slices: SliceTable
    cp: int = 1
    chunk_size: int | None = None
    config: DistAttnConfig = field(default_factory=DistAttnConfig)
    mesh_shape: tuple[int, int] | None = None
    dtype: torch.dtype = torch.float64
    num_heads_q: int = 4
    num_heads_kv: int = 2
    head_dim: int = 8
    head_dim_v: int = 8
    num_sinks: int = 0
    softcap: float = 0.0
    softmax_scale: float | None = None
    max_logits: bool = True
    seed: int = 0
    total_k: int | None = None
    is_q_permutable: bool = True
    is_k_permutable: bool = True

    @property
    def num_keys(self) -> int:
        return self.total if self.total_k is None else self.total_k


@dataclass
class Answer:
    """Global tensors: the outputs, and the gradients of a random linear function of out and lse."""

    out: Tensor
    lse: Tensor
    max_logits: Tensor | None
    gradients: list[Tensor]

    def tensors(self) -> dict[str, Tensor]:
        names = ["q", "k", "v", "sink"]
        return {"out": self.out, "lse": self.lse} | {
            f"d{name}": gradient for name, gradient in zip(names, self.gradients, strict=False)
        }

    def on(self, device: str) -> "Answer":
        maximum = None if self.max_logits is None else self.max_logits.to(device)
        return Answer(self.out.to(device), self.lse.to(device), maximum, [x.to(device) for x in self.gradients])


def inputs_of(case: Case) -> tuple[list[Tensor], Tensor, Tensor]:
    """q, k, v and, if asked for, the sink; then the gradients of out and lse."""
    generator = torch.Generator().manual_seed(case.seed)

    def draw(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    tensors = [
        draw(case.total, case.num_heads_q, case.head_dim),
        draw(case.num_keys, case.num_heads_kv, case.head_dim),
        draw(case.num_keys, case.num_heads_kv, case.head_dim_v),
    ]
    accumulation = torch.promote_types(case.dtype, torch.float32)
    if case.num_sinks:
        tensors.append(draw(case.num_sinks, case.num_heads_q, dtype=accumulation))
    dlse = draw(case.total, case.num_heads_q, dtype=accumulation)
    return tensors, draw(case.total, case.num_heads_q, case.head_dim_v), dlse


def objective(out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor) -> Tensor:
    """A linear function of out and of lse where it is finite."""
    finite = torch.where(lse.isfinite(), lse, 0.0)
    return (out * dout).double().sum() + (finite * dlse).double().sum()


_groups: dict[object, object] = {}


def group_of(case: Case) -> dist.ProcessGroup | DeviceMesh:
    """The group of the first ``cp`` ranks, or this rank's of the meshes that all ranks together form."""
    wanted = case.mesh_shape or case.cp
    if wanted not in _groups:
        if case.mesh_shape is None:
            _groups[wanted] = dist.new_group(range(case.cp))
        else:
            names = ("replica", "node", "local")
            ranks = torch.arange(dist.get_world_size()).view(-1, *case.mesh_shape)
            _groups[wanted] = DeviceMesh(device().type, ranks, mesh_dim_names=names)["node", "local"]
    return _groups[wanted]  # type: ignore[return-value]


def device() -> torch.device:
    on_gpu = dist.is_initialized() and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def attend_twice(rank: int, world_size: int, case: Case) -> Answer | None:
    """Run the case twice on this rank; the bits must be the same. Rank 0 returns the answer."""
    group = group_of(case)
    if case.mesh_shape is None and rank >= case.cp:
        return None
    first, second = attend(case, group), attend(case, group)
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, second.tensors()[name]), f"{name} changed on a second run"
    return first if rank == 0 else None


def key_of(case: Case, group: dist.ProcessGroup | DeviceMesh | None):
    rows = case.slices.rows.tolist()
    return magi_attn_flex_key(
        q_ranges=AttnRanges.from_ranges([row[0:2] for row in rows]),
        k_ranges=AttnRanges.from_ranges([row[2:4] for row in rows]),
        attn_mask_type=[AttnMaskType.from_int_type(row[4]) for row in rows],
        total_seqlen_q=case.total,
        total_seqlen_k=case.num_keys,
        num_heads_q=case.num_heads_q,
        num_heads_kv=case.num_heads_kv,
        head_dim=case.head_dim,
        pad_size=0,
        cp_group_or_mesh=group,
        dist_attn_config=case.config,
        is_same_source=case.total_k is None,
        is_q_permutable=case.is_q_permutable,
        is_k_permutable=case.is_k_permutable,
    )


def attend(case: Case, group: dist.ProcessGroup | DeviceMesh | None) -> Answer:
    key = key_of(case, group)
    tensors, dout, dlse = inputs_of(case)
    tensors = [x.to(device()).requires_grad_() for x in tensors]
    roles = (AttnRole.QUERY, AttnRole.KEY, AttnRole.VALUE)
    q, k, v = (dispatch(x, key, attn_role=role) for x, role in zip(tensors, roles, strict=False))
    sink = tensors[3] if case.num_sinks else None
    out, meta = calc_attn(
        q,
        k,
        v,
        key,
        sink=sink,
        softmax_scale=case.softmax_scale,
        softcap=case.softcap,
        return_max_logits=case.max_logits,
    )
    out, lse = undispatch(out, key), undispatch(meta.lse, key)
    objective(out, lse, dout.to(device()), dlse.to(device())).backward()
    maximum = None if meta.max_logits is None else meta.max_logits.cpu()
    return Answer(out.detach().cpu(), lse.detach().cpu(), maximum, [x.grad.cpu() for x in tensors])


def dense_answer(case: Case, dtype: torch.dtype, on: str = "cpu") -> Answer:
    """The dense answer computed in ``dtype``: the oracle's in float64, plain PyTorch's in the case's own."""
    tensors, dout, dlse = inputs_of(case)
    if dtype == torch.float64:
        tensors = [x.double() for x in tensors]
    tensors = [x.to(on).requires_grad_() for x in tensors]
    sink = tensors[3] if case.num_sinks else None
    options = {"softmax_scale": case.softmax_scale, "softcap": case.softcap, "sink": sink}
    if dtype == torch.float64:
        out, lse, max_logits = dense_attention(*tensors[:3], case.slices, **options)
    else:
        mask = dense_mask(case.slices, case.total, case.num_keys, on)
        out, lse, max_logits = masked_attention(*tensors[:3], mask, **options)
    objective(out, lse, dout.to(on, dtype), dlse.to(on, dtype)).backward()
    return Answer(out.detach(), lse.detach(), max_logits, [x.grad for x in tensors])


def assert_right(case: Case, answer: Answer, on: str = "cpu") -> None:
    """Float64 cases agree with the oracle to 1e-10, others err at most twice as much as plain PyTorch.

    Both are computed, and compared, ``on`` this device.
    """
    answer, oracle = answer.on(on), dense_answer(case, torch.float64, on)
    if case.max_logits:
        tolerance = max(10 * torch.finfo(case.dtype).eps, 1e-10)
        torch.testing.assert_close(answer.max_logits.double(), oracle.max_logits, rtol=tolerance, atol=tolerance)
    if case.dtype == torch.float64:
        for name, tensor in answer.tensors().items():
            expected = oracle.tensors()[name]
            torch.testing.assert_close(tensor, expected, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
        return
    plain = dense_answer(case, case.dtype, on)
    for name, tensor in answer.tensors().items():
        expected, granted = oracle.tensors()[name], 0.0
        if name == "dsink" and case.dtype == torch.float32:
            # exp(sink - lse) inherits the rounding of lse, a number near 5, where plain PyTorch divides two sums. Other
            # gradients average that over many rows, but the sink's is mostly that of the few rows with the fewest keys.
            lse = oracle.lse[oracle.lse.isfinite()]
            granted = torch.finfo(case.dtype).eps * float(lse.abs().max() * expected.abs().max())
        # Triton's exponentials are approximations, which counts in float32 alone.
        factor = 4.0 if torch.cuda.is_available() and case.dtype == torch.float32 else 2.0
        assert_within_pytorch_error(tensor, expected, plain.tensors()[name], factor, name, granted)
