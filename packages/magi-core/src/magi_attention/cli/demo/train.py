# SPDX-License-Identifier: Apache-2.0
"""The training loop, the same for one rank and for several."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from magi_attention.api import (
    calc_attn,
    dispatch,
    dist_attn_runtime_dict_mgr,
    get_position_ids,
    magi_attn_flex_key,
)
from magi_attention.cli.demo.data import IGNORED, PackedBatch, pack
from magi_attention.cli.demo.model import Llama, ModelConfig
from magi_attention.cli.demo.options import DemoOptions, Precision
from magi_attention.common.enum import AttnMaskType, AttnOverlapMode
from magi_attention.common.ranges import AttnRanges
from magi_attention.config import DispatchConfig, DistAttnConfig, OverlapConfig, RuntimeConfig
from magi_attention.dist_attn_runtime_mgr import DistAttnRuntimeKey
from magi_attention.plan.build import Plan

LEARNING_RATE = 2e-3

SMALLEST_PIECE = 64
"""Fewest rows that are moved between overlap stages: short, as a demo's sequences are."""


@dataclass(frozen=True)
class StepResult:
    """One optimizer step.

    Attributes:
        loss: mean cross-entropy in nats over all labeled rows of the sequence, the same on every rank.
        planning_seconds: time to make the step's key, the ranks' check that they planned the same included.
        seconds: time of the whole step, planning included.
    """

    loss: float
    planning_seconds: float
    seconds: float


def attention_config(options: DemoOptions) -> DistAttnConfig:
    """Translate the demo's options."""
    casts = options.precision in (Precision.BF16, Precision.FP16)
    return DistAttnConfig(
        dispatch_config=DispatchConfig(uneven_shard=options.uneven),
        overlap_config=OverlapConfig(
            mode=AttnOverlapMode.DYNAMIC if options.overlap_degree is None else AttnOverlapMode.STATIC,
            degree=options.overlap_degree,
            min_chunk_size=SMALLEST_PIECE,
        ),
        runtime_config=RuntimeConfig(
            kernel_backend=options.backend, precision=options.precision.value if casts else "input"
        ),
    )


def make_key(batch: PackedBatch, options: DemoOptions, group: dist.ProcessGroup | None) -> DistAttnRuntimeKey:
    """Plan the attention of one packed sequence."""
    rows = batch.mask.rows
    total = len(batch.tokens)
    return magi_attn_flex_key(
        q_ranges=AttnRanges.from_ranges(rows[:, 0:2].tolist()),
        k_ranges=AttnRanges.from_ranges(rows[:, 2:4].tolist()),
        attn_mask_type=[AttnMaskType.from_int_type(kind) for kind in rows[:, 4].tolist()],
        total_seqlen_q=total,
        total_seqlen_k=total,
        num_heads_q=options.heads,
        num_heads_kv=options.kv_heads,
        head_dim=options.dim // options.heads,
        pad_size=0,
        cp_group_or_mesh=group,
        dist_attn_config=attention_config(options),
    )


def train(
    documents: Sequence[bytes],
    options: DemoOptions,
    device: torch.device,
    group: dist.ProcessGroup | None,
    on_step: Callable[[StepResult], None],
) -> Plan:
    """Train a model from the seed; with a group, every rank of it calls this with the same arguments.

    Returns the plan that this rank carried out in the last step.
    """
    # A process stands for a device, and gets one core. More threads than free cores would slow each other to a crawl.
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    model = Llama(ModelConfig(options.layers, options.heads, options.kv_heads, options.dim))
    model.to(device, torch.float64 if options.precision is Precision.FP64 else torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95))
    for step in range(options.steps):
        start = time.perf_counter()
        batch = pack(documents, options.tokens, options.mask, options.seed, step)
        planning_start = time.perf_counter()
        key = make_key(batch, options, group)
        planning_seconds = time.perf_counter() - planning_start
        loss = backpropagate(model, batch, key, device)
        if group is not None:
            sum_over_ranks(model, loss, group)
        optimizer.step()
        optimizer.zero_grad()
        on_step(StepResult(loss.item(), planning_seconds, time.perf_counter() - start))
    return dist_attn_runtime_dict_mgr[key].dist_attn_runtime.plan


def backpropagate(model: nn.Module, batch: PackedBatch, key: DistAttnRuntimeKey, device: torch.device) -> Tensor:
    """Run forward and backward over the rows that this rank holds.

    Returns this rank's part of the loss, a float64 scalar: the cross-entropy of its own labels, divided by the number
    of labels in the whole sequence, so that losses and gradients have only to be added up over the ranks.
    """
    tokens = dispatch(torch.from_numpy(batch.tokens).to(device), key)
    labels = dispatch(torch.from_numpy(batch.labels).to(device), key, pad_value=IGNORED)
    position_ids = get_position_ids(key).to(device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return calc_attn(q, k, v, key)[0]

    logits = model(tokens, position_ids, attend)
    # Thousands of terms are added in float64, so that the order in which ranks hold them leaves no trace.
    losses = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none").double()
    loss = losses.sum() / batch.num_predictions
    loss.backward()
    return loss.detach()


def sum_over_ranks(model: nn.Module, loss: Tensor, group: dist.ProcessGroup) -> None:
    """Add up, in place, the gradients of the replicated parameters and the parts of the loss."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat, group=group)
    for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient))
    dist.all_reduce(loss, group=group)
