# SPDX-License-Identifier: Apache-2.0
"""One attention stage of a kernel backend, held against the dense oracle: every backend's tests start here."""

from typing import NamedTuple

import torch
from torch import Tensor

from magi_attention.common.slices import SliceTable
from magi_attention.kernels.protocol import AttentionCall, AttentionResult, KernelBackend
from magi_attention.testing.metric import assert_within_pytorch_error
from magi_attention.testing.oracle import dense_attention, dense_mask, masked_attention

NAMES = ("out", "lse", "max_logits", "dq", "dk", "dv")


class Inputs(NamedTuple):
    """What goes into a stage: q ``[tq, hq, d]``, k, v ``[tk, hk, d or dv]``, and the gradients of out and lse."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor


def random_inputs(
    num_q: int,
    num_k: int,
    *,
    heads: tuple[int, int] = (4, 2),
    dims: tuple[int, int] = (16, 16),
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Draw normal q, k, v and gradients of out and lse. ``heads`` is (hq, hk), ``dims`` (d, dv)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    return Inputs(
        q=draw(num_q, heads[0], dims[0]),
        k=draw(num_k, heads[1], dims[0]),
        v=draw(num_k, heads[1], dims[1]),
        dout=draw(num_q, heads[0], dims[1]),
        dlse=draw(num_q, heads[0]).to(torch.float64 if dtype == torch.float64 else torch.float32),
    )


def run_stage(backend: KernelBackend, x: Inputs, call: AttentionCall) -> tuple[AttentionResult, tuple[Tensor, ...]]:
    """Run a call that is the only stage of its attention, forward and backward."""
    result = backend.forward(x.q, x.k, x.v, call)
    return result, backend.backward(x.dout, x.q, x.k, x.v, result.out, result.lse, x.dlse, call)


def run_dense(x: Inputs, slices: SliceTable, scale: float, softcap: float, *, oracle: bool) -> list[Tensor]:
    """Return what ``NAMES`` lists, by the float64 oracle, or by plain PyTorch in the inputs' dtype."""
    dtype = torch.float64 if oracle else x.q.dtype
    q, k, v = leaves = tuple(tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in (x.q, x.k, x.v))
    if oracle:
        out, lse, largest = dense_attention(q, k, v, slices, softmax_scale=scale, softcap=softcap)
    else:
        mask = dense_mask(slices, len(q), len(k), q.device)
        out, lse, largest = masked_attention(q, k, v, mask, softmax_scale=scale, softcap=softcap)
    # Rows without keys have no lse to differentiate.
    dlse = x.dlse.to(dtype).masked_fill(lse == -torch.inf, 0.0)
    return [out, lse, largest, *torch.autograd.grad((out, lse), leaves, (x.dout.to(dtype), dlse))]


def assert_stage_is_right(
    backend: KernelBackend,
    x: Inputs,
    slices: SliceTable,
    *,
    softcap: float = 0.0,
    max_logits: bool = False,
    factor: float = 2.0,
) -> None:
    """Hold a stage against the oracle: to 1e-10 in float64, otherwise within ``factor`` times plain PyTorch's error."""
    scale = 1.1 * x.q.shape[-1] ** -0.5
    call = AttentionCall(slices, scale, softcap, max_logits=max_logits)
    result, gradients = run_stage(backend, x, call)
    truth = run_dense(x, slices, scale, softcap, oracle=True)
    plain = run_dense(x, slices, scale, softcap, oracle=False)
    assert (result.max_logits is not None) == max_logits
    actual = [result.out, result.lse, result.max_logits, *gradients]
    for name, ours, reference, pytorch in zip(NAMES, actual, truth, plain, strict=True):
        if ours is None:
            continue
        if x.q.dtype == torch.float64:
            assert torch.allclose(ours, reference, rtol=1e-10, atol=1e-10), name
        else:
            assert_within_pytorch_error(ours, reference, pytorch, factor, name)
