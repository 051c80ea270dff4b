# SPDX-License-Identifier: Apache-2.0
"""Attention in selective activation checkpoints: policies see it as one operator, whose results they may keep."""

from functools import partial
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from magi_attention.api import calc_attn, compiled, dispatch, roll
from tests.core.test_compile import (
    DIM,
    HEADS,
    KV_HEADS,
    Attention,
    by_key,
    by_slices,
    make_key,
    run,
    tokens,
    whole_step,
)

MASKS = {
    by_key: lambda: (make_key(30, 50),),
    whole_step: lambda: (make_key(30, 47),),
    by_slices: lambda: (torch.tensor([[0, 30], [30, 50]]), torch.tensor([1, 3])),
}
ATTENTIONS = ("magi_attention.calc_attn.default", "magi_attention.flex_flash_attn.default")

pytestmark = pytest.mark.usefixtures("empty_cache")

KEPT = {
    "all": lambda name: True,
    "attentions": lambda name: name in ATTENTIONS,
    "all else": lambda name: name not in ATTENTIONS,
    "nothing": lambda name: False,
}


class Checkpointed(torch.nn.Module):
    """A model as a checkpoint that keeps the results of operators of certain names."""

    def __init__(self, model, keeps):
        super().__init__()
        self.model = model

        def policy(ctx, operator, *args, **kwargs):
            return CheckpointPolicy.MUST_SAVE if keeps(str(operator)) else CheckpointPolicy.PREFER_RECOMPUTE

        self.contexts = partial(create_selective_checkpoint_contexts, policy)

    def forward(self, *args):
        return checkpoint(self.model, *args, use_reentrant=False, context_fn=self.contexts)


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("attend", MASKS)
def test_whatever_is_kept_gradients_are_the_same(attend, kept):
    model, mask, x = Attention(attend, with_sink=True), MASKS[attend](), tokens(47 if attend is whole_step else 50)
    expected = run(model, x, *mask)
    torch.testing.assert_close(run(Checkpointed(model, KEPT[kept]), x, *mask), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kept", "times"), [("attentions", 1), ("nothing", 2)])
def test_an_attention_that_is_kept_is_not_computed_again(kept, times):
    model, key = Attention(by_key, with_sink=False), make_key(30, 50)
    with mock.patch.object(compiled, "attend", wraps=compiled.attend) as attend:
        run(Checkpointed(model, KEPT[kept]), tokens(50), key)
    assert attend.call_count == times


class Watching(TorchDispatchMode):
    """As those that count operations do."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_other_modes_see_what_runs():
    """They may be on on one rank alone, which must exchange what the others do."""
    model, key = Attention(by_key, with_sink=False), make_key(30, 50)
    with mock.patch.object(compiled, "attend", wraps=compiled.attend) as attend, Watching():
        run(model, tokens(50), key)
    assert not attend.call_count


def test_arguments_are_checked_there_too():
    key, x = make_key(30, 50), tokens(50)
    heads = x[:, None, :DIM]
    caching, _ = create_selective_checkpoint_contexts([])
    scale = torch.tensor(0.5, requires_grad=True)
    with caching:
        with pytest.raises(TypeError, match="softmax_scale"):
            calc_attn(heads.expand(-1, HEADS, -1), *2 * [heads.expand(-1, KV_HEADS, -1)], key, softmax_scale=scale)
        with pytest.raises(TypeError, match="shift"):
            roll(x, 1.5, 0, key)
        with pytest.raises(ValueError, match="attn_role"):
            dispatch(x, key, attn_role="key")
        with pytest.raises(ValueError, match="pad_value"):
            dispatch(x.long(), key, pad_value=2**53 + 1)
