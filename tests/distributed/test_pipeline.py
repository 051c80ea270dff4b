# SPDX-License-Identifier: Apache-2.0
"""Stages of torch.distributed.pipelining, each over a context-parallel group, train as one process does."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from magi_attention.api import calc_attn, dispatch, magi_attn_varlen_key
from magi_attention.testing.distributed import RankPool

pytestmark = pytest.mark.filterwarnings("ignore")
HEADS, KV_HEADS, DIM, TOTAL, CLASSES = 4, 2, 8, 96, 10
WIDTH = HEADS * DIM
CUTS = [[0, 30, TOTAL], [0, TOTAL], [0, 7, 50, TOTAL], [0, 64, TOTAL]]  # one sequence a micro-batch


class Stage(nn.Module):
    """One layer, and the last stage's classes."""

    def __init__(self, is_last):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * DIM)
        self.head = nn.Linear(WIDTH, CLASSES) if is_last else nn.Identity()

    def forward(self, x, keys, micro_batch):  # as docs/integrations/fsdp2.md has it
        key = keys[0] if micro_batch.is_meta else keys[int(micro_batch)]
        q, k, v = self.qkv(x[0]).unflatten(1, (-1, DIM)).split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        return self.head(x[0] + calc_attn(q, k, v, key)[0].flatten(1))[None]


def make_stages():
    torch.manual_seed(0)
    return [Stage(is_last).double() for is_last in (False, True)]


def make_batch(group):
    """Inputs and labels ``[micro-batches, n_local, ...]``, the sum of whose losses is a mean, and the keys."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(len(CUTS), TOTAL, WIDTH, generator=draw, dtype=torch.float64)
    labels = torch.randint(CLASSES, (len(CUTS), TOTAL), generator=draw)
    keys = [magi_attn_varlen_key(cuts, cuts, HEADS, KV_HEADS, DIM, 0, group, causal=True) for cuts in CUTS]
    rows = [dispatch(each, key) for each, key in zip(x, keys, strict=True)]
    targets = [dispatch(each, key, pad_value=-100) for each, key in zip(labels, keys, strict=True)]
    return torch.stack(rows), torch.stack(targets), keys


def mean_loss(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / (len(CUTS) * TOTAL)


def train_in_a_pipeline(rank, world_size):
    """The number of this rank's stage, and its gradients."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "cp"))
    number = mesh.get_local_rank("pp")
    module = make_stages()[number]
    stage = PipelineStage(module, number, 2, torch.device("cpu"), group=mesh["pp"].get_group())
    x, labels, keys = make_batch(mesh["cp"])
    schedule = Schedule1F1B(stage, len(keys), loss_fn=mean_loss, scale_grads=False)
    given = {"keys": keys, "micro_batch": torch.arange(len(keys))}
    if number == 0:
        schedule.step(x, **given)
    else:
        schedule.step(target=labels, **given)
    gradients = [each.grad for each in module.parameters()]
    for each in gradients:
        torch.distributed.all_reduce(each, group=mesh["cp"].get_group())
    return number, gradients


def train_alone():
    stages = make_stages()
    for number, (x, labels, key) in enumerate(zip(*make_batch(None), strict=True)):
        logits = x[None]
        for stage in stages:
            logits = stage(logits, {number: key}, torch.tensor([number]))
        mean_loss(logits, labels[None]).backward()
    return [[each.grad for each in stage.parameters()] for stage in stages]


def test_every_micro_batch_has_its_own_mask():
    expected = train_alone()
    with RankPool(4) as pool:
        for number, gradients in pool.run(train_in_a_pipeline):
            torch.testing.assert_close(gradients, expected[number], rtol=1e-10, atol=1e-12)
