# SPDX-License-Identifier: Apache-2.0
"""Index attention for tests: lists of keys, and the dense oracle with the mask that they make."""

import torch
from torch import Tensor

from magi_attention.testing.oracle import masked_attention


def random_lists(
    num_q: int, num_kv_heads: int, num_k: int, longest: int, *, device: str = "cpu", seed: int = 0
) -> Tensor:
    """Draw lists ``[num_q, num_kv_heads, longest]`` int32 of different keys, of lengths from 0 to ``longest``."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (num_q, num_kv_heads)
    keys = torch.rand(*shape, num_k, generator=generator, device=device).argsort(-1)[..., :longest].int()
    lists = torch.nn.functional.pad(keys, (0, longest - keys.shape[2]), value=-1)
    lengths = torch.randint(0, longest + 1, shape, generator=generator, device=device)
    # Many lists are full, as those of indexers are.
    lengths = torch.where(torch.rand(shape, generator=generator, device=device) < 0.5, longest, lengths)
    return lists.masked_fill(torch.arange(longest, device=device) >= lengths[..., None], -1)


def mask_of_lists(lists: Tensor, num_k: int) -> Tensor:
    """Return which keys the lists name, ``[num_q, num_kv_heads, num_k]``."""
    places = lists.long().masked_fill(lists < 0, num_k)
    return torch.zeros(*lists.shape[:2], num_k + 1, dtype=torch.bool, device=lists.device).scatter_(2, places, True)[
        ..., :num_k
    ]


def dense_index_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Tensor,
    *,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend to lists densely, in the inputs' dtype; otherwise as ``masked_attention`` in :mod:`.oracle`."""
    mask = mask_of_lists(lists, k.shape[0]).transpose(0, 1).repeat_interleave(q.shape[1] // k.shape[1], 0)
    return masked_attention(q, k, v, mask, softmax_scale=softmax_scale, softcap=softcap, sink=sink)
