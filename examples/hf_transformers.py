# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face Transformers model whose attention spans all ranks: registered by name, the model stays as it is.

Needs ``pip install transformers``. Runs as one process, or on several:

    torchrun --nproc-per-node 4 examples/hf_transformers.py
"""

import os
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from magi_attention.api import DistAttnRuntimeKey, dispatch, get_position_ids, magi_attn_varlen_key
from magi_attention.integrations.transformers import register

CU_SEQLENS = torch.tensor([0, 300, 500, 1000])  # three packed documents
TOTAL = int(CU_SEQLENS[-1])

register()  # makes attn_implementation="magi" known


def make_model(attention: str) -> LlamaForCausalLM:
    """A small Llama with random weights, the same on every rank; `from_pretrained` takes the same argument."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, attn_implementation=attention,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def plan(model: LlamaForCausalLM) -> DistAttnRuntimeKey:
    """The key of the packed documents for the model's heads."""
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    heads = config.num_attention_heads, config.num_key_value_heads, head_dim
    return magi_attn_varlen_key(CU_SEQLENS, CU_SEQLENS, *heads, pad_size=0, cp_group_or_mesh=None, causal=True)


def main() -> None:
    """One step, compared with Transformers' own attention, document by document."""
    if "WORLD_SIZE" in os.environ:  # set by torchrun
        dist.init_process_group("gloo")
    tokens = torch.randint(256, (TOTAL,), generator=torch.Generator().manual_seed(1))
    labels = tokens.roll(-1)
    labels[CU_SEQLENS[1:] - 1] = -100  # the last token of a document has no target
    num_targets = int((labels != -100).sum())

    model = make_model("magi")
    key = plan(model)
    local_tokens, local_labels = dispatch(tokens, key), dispatch(labels, key, pad_value=-100)
    positions = get_position_ids(key)
    positions = positions - CU_SEQLENS[torch.searchsorted(CU_SEQLENS, positions, right=True) - 1]

    # Labels stay out of the model, which would shift them along the local rows.
    logits = model(local_tokens[None], position_ids=positions[None], magi_key=key, use_cache=False).logits[0]
    loss = F.cross_entropy(logits, local_labels, ignore_index=-100, reduction="sum") / num_targets
    loss.backward()
    total = loss.detach()
    if dist.is_initialized():
        for each in (total, *(parameter.grad for parameter in model.parameters())):
            dist.all_reduce(each)  # each rank holds the part of its own rows

    reference = make_model("sdpa")
    for start, end in pairwise(CU_SEQLENS.tolist()):
        logits = reference(tokens[None, start:end], use_cache=False).logits[0]
        (F.cross_entropy(logits, labels[start:end], ignore_index=-100, reduction="sum") / num_targets).backward()
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    error = max(float((ours.grad - theirs.grad).norm() / theirs.grad.norm()) for ours, theirs in pairs)
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"loss {float(total):.6f}, largest relative difference of gradients {error:.1e}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
