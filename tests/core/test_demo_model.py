# SPDX-License-Identifier: Apache-2.0
"""The demo's model over packed documents against the same model over each document alone."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from magi_attention.cli.demo.masks import build_mask
from magi_attention.cli.demo.model import Llama, ModelConfig, rotary_tables, rotate
from magi_attention.cli.demo.options import MaskFamily
from magi_attention.testing.oracle import dense_attention

ENDS = np.array([0, 17, 20, 48])


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Llama(ModelConfig(layers=2, heads=4, kv_heads=2, dim=32)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def causal_attention(q, k, v):
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def test_packed_documents_are_computed_as_if_alone(model):
    mask = build_mask(MaskFamily.VARLEN_CAUSAL, ENDS)
    tokens, positions = torch.randint(256, (int(ENDS[-1]),)), torch.arange(int(ENDS[-1]))
    packed = model(tokens, positions, lambda q, k, v: dense_attention(q, k, v, mask)[0])
    alone = torch.cat(
        [
            model(tokens[start:stop], torch.arange(stop - start), causal_attention)
            for start, stop in pairwise(ENDS.tolist())
        ]
    )
    torch.testing.assert_close(packed, alone, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(packed)
    gradients = [torch.autograd.grad((logits * weights).sum(), list(model.parameters())) for logits in (packed, alone)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_rows_in_another_order_give_the_same_with_their_position_ids(model):
    tokens, order = torch.randint(256, (48,)), torch.randperm(48)
    back = order.argsort()

    def attend_shuffled(q, k, v):
        return causal_attention(q[back], k[back], v[back])[order]

    straight = model(tokens, torch.arange(48), causal_attention)
    shuffled = model(tokens[order], order, attend_shuffled)
    torch.testing.assert_close(shuffled[back], straight, rtol=1e-10, atol=1e-10)


def test_rotary_embedding_rotates_pairs_by_the_position():
    x = torch.randn(5, 2, 8, dtype=torch.float64)
    positions = torch.tensor([0, 1, 7, 1000, 3])
    turned = rotate(x, rotary_tables(positions, 8, 100.0, torch.float64))
    angle = positions[:, None, None] * torch.tensor([100.0 ** (-i / 4) for i in range(4)], dtype=torch.float64)
    expected = torch.view_as_complex(x.unflatten(-1, (2, 4)).transpose(-1, -2).contiguous()) * torch.exp(1j * angle)
    torch.testing.assert_close(turned, torch.cat([expected.real, expected.imag], -1))


def test_heads_sharing_keys_are_fewer():
    model = Llama(ModelConfig(layers=1, heads=4, kv_heads=2, dim=32))
    seen = []
    model(torch.zeros(3, dtype=torch.long), torch.arange(3), lambda q, k, v: seen.append((q, k, v)) or q)
    assert [tuple(x.shape) for x in seen[0]] == [(3, 4, 8), (3, 2, 8), (3, 2, 8)]
