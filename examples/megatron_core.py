# SPDX-License-Identifier: Apache-2.0
"""A Megatron-Core GPT model whose core attention spans all ranks, on packed documents with padding between them.

Needs ``pip install megatron-core``, no GPU. Runs as one process, or on several:

    torchrun --nproc-per-node 2 examples/megatron_core.py
"""

import os
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from magi_attention.integrations.megatron import (
    MagiCoreAttention,
    dispatch_batch,
    plan_packed_sequence,
    use_dispatched_positions,
)

VOCABULARY = 256
# Two documents, of 300 and 190 tokens, each padded to a multiple of 64.
CU_SEQLENS, CU_SEQLENS_PADDED = torch.tensor([0, 300, 490]), torch.tensor([0, 320, 512])
DOCUMENTS = [
    (int(start), int(start + length)) for start, length in zip(CU_SEQLENS_PADDED, CU_SEQLENS.diff(), strict=False)
]


def make_model(**settings: Any) -> GPTModel:
    """A small GPT, the same on every rank."""
    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, num_query_groups=2, attention_dropout=0.0,
        hidden_dropout=0.0, context_parallel_size=parallel_state.get_context_parallel_world_size(),
        calculate_per_token_loss=True, use_cpu_initialization=True, gradient_accumulation_fusion=False, **settings,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec()  # or get_gpt_layer_with_transformer_engine_spec()
    spec.submodules.self_attention.submodules.core_attention = MagiCoreAttention
    model = GPTModel(config, spec, VOCABULARY, max_sequence_length=512, position_embedding_type="rope")
    use_dispatched_positions(model)
    return model


def make_batch() -> dict[str, Tensor]:
    """Tokens, labels and the mask of the loss of the whole sequence, ``[1, S]``, as a data loader gives them."""
    total = int(CU_SEQLENS_PADDED[-1])
    tokens = torch.randint(VOCABULARY, (1, total), generator=torch.Generator().manual_seed(1))
    loss_mask = torch.zeros(1, total)
    for start, end in DOCUMENTS:
        loss_mask[0, start : end - 1] = 1.0  # the last token has no target
    return {"tokens": tokens, "labels": tokens.roll(-1, dims=1), "loss_mask": loss_mask}


def step(model: GPTModel, batch: dict[str, Tensor]) -> Tensor:
    """Forward and backward over this rank's rows; returns the loss of all."""
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=CU_SEQLENS, cu_seqlens_q_padded=CU_SEQLENS_PADDED)
    params = plan_packed_sequence(packed, model.config)
    local = dispatch_batch(batch, params)
    labels, loss_mask = local["labels"], local["loss_mask"]
    losses = model(local["tokens"], local["position_ids"], None, labels=labels, packed_seq_params=params)
    loss = (losses * loss_mask).sum() / batch["loss_mask"].sum()
    loss.backward()
    total = loss.detach()
    group = parallel_state.get_context_parallel_group()
    for each in (total, *(parameter.grad for parameter in model.parameters())):
        dist.all_reduce(each, group=group)  # Megatron's DistributedDataParallel does it for gradients
    return total


def main() -> None:
    """One step."""
    if "WORLD_SIZE" in os.environ:  # set by torchrun
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(context_parallel_size=dist.get_world_size())
    model = make_model()
    loss = step(model, make_batch())
    if dist.get_rank() == 0:
        norm = torch.stack([each.grad.norm() for each in model.parameters() if each.grad is not None]).norm()
        print(f"loss {float(loss):.6f}, gradient norm {float(norm):.6f}")
    dist.barrier()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
