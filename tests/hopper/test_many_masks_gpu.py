# SPDX-License-Identifier: Apache-2.0
"""Ten thousand random small masks in both passes: hundreds side by side in one call, each held against the oracle.

``MAGI_TEST_MASKS`` is how many; ``MAGI_TEST_MASKS_SEED`` draws others.
"""

import os
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from magi_attention.common.slices import SliceTable
from magi_attention.kernels.protocol import AttentionCall, AttentionRequest
from magi_attention.testing.masks import MASK_FAMILIES
from magi_attention.testing.metric import assert_within_pytorch_error
from magi_attention.testing.oracle import masked_attention
from magi_kernels_hopper import BACKEND

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]

NUM_MASKS = int(os.environ.get("MAGI_TEST_MASKS", "10000"))
SEED = int(os.environ.get("MAGI_TEST_MASKS_SEED", "0"))
PER_CALL, MOST_TOKENS = 250, 100
KINDS = [(heads, dim, ordered) for heads in ((1, 1), (4, 2), (8, 1)) for dim in (64, 128) for ordered in (False, True)]


@dataclass
class Batch:
    """Masks side by side, and dense: mask ``[n, tq, tk]``, and where the tokens of each lie in the call's tensors."""

    slices: SliceTable
    mask: Tensor
    q_rows: Tensor
    k_rows: Tensor
    num_q: int
    num_k: int


def draw_window(rng: np.random.Generator) -> tuple[int, int, SliceTable]:
    """A window of a mask of any family: its queries and keys."""
    total = int(rng.integers(1, MOST_TOKENS + 1))
    family = MASK_FAMILIES[sorted(MASK_FAMILIES)[rng.integers(len(MASK_FAMILIES))]]
    slices = family(total, rng)
    if rng.random() < 0.5:
        return total, total, slices
    (q0, q1), (k0, k1) = np.sort(rng.integers(0, total, (2, 2)))
    window = slices.clip_rows(q0, q1 + 1).clip_columns(k0, k1 + 1).shift(-q0, -k0)
    return int(q1 + 1 - q0), int(k1 + 1 - k0), window


def draw_batch(rng: np.random.Generator) -> Batch:
    drawn = [draw_window(rng) for _ in range(PER_CALL)]
    lengths = np.array([[num_q, num_k] for num_q, num_k, _ in drawn])
    starts = np.cumsum(lengths, 0) - lengths
    rows = [each.shift(*start).rows for (_, _, each), start in zip(drawn, starts.tolist(), strict=True)]
    most = max(len(each) for _, _, each in drawn)
    own = np.zeros((PER_CALL, most, 5), np.int64)
    for table, (_, _, each) in zip(own, drawn, strict=True):
        table[: len(each)] = each.rows
    device = torch.device("cuda")
    places = torch.arange(MOST_TOKENS, device=device)
    q_rows, k_rows = (
        torch.where(places < length[:, None], start[:, None] + places, -1)
        for length, start in zip(
            torch.tensor(lengths.T, device=device), torch.tensor(starts.T, device=device), strict=True
        )
    )
    return Batch(
        SliceTable(np.concatenate(rows)),
        dense(torch.tensor(own, device=device)),
        q_rows,
        k_rows,
        *lengths.sum(0).tolist(),
    )


def dense(rows: Tensor) -> Tensor:
    """The pairs that slices ``[n, slices, 5]`` keep, written down cell by cell, ``[n, tokens, tokens]``."""
    row = torch.arange(MOST_TOKENS, device=rows.device)[:, None]
    column = row.T
    mask = torch.zeros(len(rows), MOST_TOKENS, MOST_TOKENS, dtype=torch.bool, device=rows.device)
    for slot in range(rows.shape[1]):
        q0, q1, k0, k1, kind = (each[:, None, None] for each in rows[:, slot].T)
        kept = (row >= q0) & (row < q1) & (column >= k0) & (column < k1)
        kept &= (column <= row + (k1 - q1)) | ((kind != 1) & (kind != 3))
        kept &= (column >= row + (k0 - q0)) | ((kind != 2) & (kind != 3))
        mask |= kept
    return mask


def padded(x: Tensor, rows: Tensor) -> Tensor:
    """Tokens of each mask, ``[n, tokens, ...]``; zeros where there are none."""
    there = (rows >= 0).view(*rows.shape, *[1] * (x.ndim - 1))
    return torch.where(there, x[rows.clamp(min=0)], 0)


def packed(x: Tensor, rows: Tensor) -> Tensor:
    return x[rows >= 0]


def expected(batch: Batch, tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """out, lse, dq, dk and dv of the whole call, computed mask by mask in ``dtype``."""
    q, k, v, dout, dlse = tensors
    leaves = [each.to(dtype).requires_grad_() for each in (q, k, v)]
    rows = (batch.q_rows, batch.k_rows, batch.k_rows)
    attend = torch.vmap(masked_attention)
    out, lse, _ = attend(*(padded(x, place) for x, place in zip(leaves, rows, strict=True)), batch.mask)
    out, lse = packed(out, batch.q_rows), packed(lse, batch.q_rows)
    gradients = torch.autograd.grad(
        (out, lse), leaves, (dout.to(dtype), dlse.masked_fill(lse == -torch.inf, 0).to(dtype))
    )
    return [each.detach() for each in (out, lse, *gradients)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_random_masks(kind):
    heads, dim, ordered = kind
    if not (support := BACKEND.supports(AttentionRequest(torch.device("cuda"), torch.bfloat16, *heads, dim, dim))):
        pytest.skip(support.reason)
    number = KINDS.index(kind)
    rng = np.random.default_rng([SEED, number])
    generator = torch.Generator("cuda").manual_seed(SEED + number)
    for _ in range(number, -(-NUM_MASKS // PER_CALL), len(KINDS)):
        batch = draw_batch(rng)

        def draw(tokens: int, num_heads: int) -> Tensor:
            return torch.randn(tokens, num_heads, dim, generator=generator, device="cuda").bfloat16()

        q, k, v, dout = (
            draw(tokens, num)
            for tokens, num in ((batch.num_q, heads[0]), *2 * [(batch.num_k, heads[1])], (batch.num_q, heads[0]))
        )
        dlse = torch.randn(batch.num_q, heads[0], generator=generator, device="cuda")
        truth = expected(batch, [q, k, v, dout, dlse], torch.float64)
        plain = expected(batch, [q, k, v, dout, dlse], torch.bfloat16)
        call = AttentionCall(batch.slices, dim**-0.5, deterministic=ordered)
        out, lse, _ = BACKEND.forward(q, k, v, call)
        gradients = BACKEND.backward(dout, q, k, v, out, lse, dlse, call)
        for name, mine, right, pytorch in zip(
            ("out", "lse", "dq", "dk", "dv"), (out, lse, *gradients), truth, plain, strict=True
        ):
            assert_within_pytorch_error(mine, right, pytorch, name=name)
