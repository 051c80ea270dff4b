# SPDX-License-Identifier: Apache-2.0
"""A Megatron-Core model with our core attention has the gradients that it has with its own, however ranks share it."""

from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

pytest.importorskip("megatron.core")

from examples.megatron_core import (
    CU_SEQLENS,
    CU_SEQLENS_PADDED,
    DOCUMENTS,
    VOCABULARY,
    make_batch,
    make_model,
    step,
)
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig

from magi_attention.integrations.megatron import (
    MagiCoreAttention,
    dispatch_batch,
    plan_packed_sequence,
    use_dispatched_positions,
)
from magi_attention.testing.distributed import RankPool
from tests.integrations.megatron_on_cpu import OPTIONS, without_gpu

pytestmark = pytest.mark.filterwarnings("ignore")
FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def gradients_of_a_step(rank, world_size, parallel, settings):
    parallel_state.initialize_model_parallel(**parallel)
    try:
        with without_gpu():
            model = make_model(**settings)
            loss = step(model, make_batch())
        return float(loss), {name: each.grad for name, each in model.named_parameters()}
    finally:
        parallel_state.destroy_model_parallel()


def own_gradients(rank, world_size):
    """By Megatron's own attention, document by document, on one process."""
    parallel_state.initialize_model_parallel()
    try:
        with without_gpu():
            torch.manual_seed(0)
            config = TransformerConfig(**OPTIONS, num_query_groups=2, hidden_dropout=0.0)
            model = GPTModel(
                config, get_gpt_layer_local_spec(), VOCABULARY, 512, position_embedding_type="rope"
            )  # fmt: skip
            batch = make_batch()
            total = 0.0
            for start, end in DOCUMENTS:
                tokens, labels, loss_mask = (batch[name][:, start:end] for name in ("tokens", "labels", "loss_mask"))
                causal = torch.ones(1, 1, end - start, end - start, dtype=torch.bool).triu(1)
                losses = model(tokens, torch.arange(end - start)[None], causal, labels=labels)
                loss = (losses * loss_mask).sum() / batch["loss_mask"].sum()
                loss.backward()
                total += float(loss)
        parameters = dict(model.named_parameters())
        return total, {n: each.grad for n, each in parameters.items()}, {n: each.data for n, each in parameters.items()}
    finally:
        parallel_state.destroy_model_parallel()


@pytest.fixture(scope="module")
def expected():
    with RankPool(1) as pool:
        return pool.run(own_gradients)[0]


def assert_equal_steps(actual, expected):
    assert actual[0] == pytest.approx(expected[0], rel=1e-5)
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (actual[1][name] - gradient).norm() < 1e-4 * gradient.norm(), name


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("recompute", [None, "full", "selective"])
def test_gradients_are_those_of_megatron_s_own_attention(world_size, recompute, expected):
    settings = FULL_RECOMPUTE if recompute == "full" else {"recompute_granularity": recompute}
    with RankPool(world_size) as pool:
        for answer in pool.run(gradients_of_a_step, {"context_parallel_size": world_size}, settings):
            assert_equal_steps(answer, expected)


def norm_of_sequence_parallelism(_cls, config, hidden_size, eps=1e-5):
    """The norm of layers without Transformer Engine, which Megatron doesn't have for sequence parallelism."""
    norm = torch.nn.LayerNorm(hidden_size, eps)
    for each in norm.parameters():
        each.sequence_parallel = config.sequence_parallel  # Megatron sums its gradients
    return norm


def step_with_tensor_parallelism(rank, world_size, sequence_parallel, weights, gradients):
    """The loss and the gradients of one rank, each with what one process has for this rank's part of the parameter."""
    sizes = {"tensor_model_parallel_size": 2}
    parallel_state.initialize_model_parallel(**sizes, context_parallel_size=2)
    try:
        with without_gpu(), mock.patch.object(WrappedTorchNorm, "__new__", norm_of_sequence_parallelism):
            model = make_model(**sizes, sequence_parallel=sequence_parallel)
            part = parallel_state.get_tensor_model_parallel_rank()

            def mine(parameter, whole):
                is_cut = getattr(parameter, "tensor_model_parallel", False)
                return whole.chunk(2, dim=parameter.partition_dim)[part].clone() if is_cut else whole

            for name, each in model.named_parameters():
                each.data.copy_(mine(each, weights[name]))
            loss = step(model, make_batch())
        for each in model.parameters():
            if getattr(each, "sequence_parallel", False):
                dist.all_reduce(each.grad, group=parallel_state.get_tensor_model_parallel_group())
        expected = {name: mine(each, gradients[name]) for name, each in model.named_parameters()}
        return (float(loss), {name: each.grad for name, each in model.named_parameters()}), expected
    finally:
        parallel_state.destroy_model_parallel()


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_parallel_ranks_have_their_heads(sequence_parallel, expected):
    loss, gradients, weights = expected
    qkv = "decoder.layers.0.self_attention.linear_qkv.weight"
    with RankPool(4) as pool:
        for answer, gradients_of_its_part in pool.run(
            step_with_tensor_parallelism, sequence_parallel, weights, gradients
        ):
            assert len(answer[1][qkv]) == len(gradients[qkv]) // 2
            assert_equal_steps(answer, (loss, gradients_of_its_part))


class OnCpu(TorchFunctionMode):
    """Megatron's pipelines make their buffers on a GPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        on_cpu = {"device": "cpu"} if str(kwargs.get("device")).startswith("cuda") else {}
        return func(*args, **kwargs | on_cpu)


def sum_of_losses(loss_mask, losses):
    return (losses * loss_mask).sum(), loss_mask.sum().int(), {}


def stage_of_a_pipeline(data_iterator, model):
    batch = next(data_iterator)
    packed = PackedSeqParams(cu_seqlens_q=CU_SEQLENS, cu_seqlens_q_padded=CU_SEQLENS_PADDED)
    params = plan_packed_sequence(packed, model.config)
    local = dispatch_batch(batch, params)
    out = model(local["tokens"], local["position_ids"], None, labels=local["labels"], packed_seq_params=params)
    return out, partial(sum_of_losses, local["loss_mask"])


def gradients_of_a_pipeline(rank, world_size, recompute, weights):
    """The gradients of one stage of two, which has one layer, after two micro-batches."""
    sizes = {"pipeline_model_parallel_size": 2, "context_parallel_size": 2}
    parallel_state.initialize_model_parallel(**sizes)
    try:
        with without_gpu(), OnCpu(), mock.patch("torch.cuda.synchronize"):
            config = TransformerConfig(
                **OPTIONS, **sizes, num_query_groups=2, hidden_dropout=0.0, calculate_per_token_loss=True,
                pipeline_dtype=torch.float32, gradient_accumulation_fusion=False, batch_p2p_comm=False, **recompute,
            )  # fmt: skip
            spec = get_gpt_layer_local_spec()
            spec.submodules.self_attention.submodules.core_attention = MagiCoreAttention
            stage = parallel_state.get_pipeline_model_parallel_rank()
            ends = {"pre_process": stage == 0, "post_process": stage == 1}
            model = GPTModel(config, spec, VOCABULARY, 512, position_embedding_type="rope", **ends)
            use_dispatched_positions(model)
            parameters = {n.replace("layers.0", f"layers.{stage}"): each for n, each in model.named_parameters()}
            for name, each in parameters.items():
                each.data.copy_(weights[name])
            get_forward_backward_func()(
                forward_step_func=stage_of_a_pipeline, data_iterator=iter([make_batch()] * 2), model=model,
                num_microbatches=2, seq_length=512, micro_batch_size=1, forward_only=False,
            )  # fmt: skip
        for each in parameters.values():
            dist.all_reduce(each.grad, group=parallel_state.get_context_parallel_group())
        return {name: each.grad for name, each in parameters.items()}
    finally:
        parallel_state.destroy_model_parallel()


@pytest.mark.parametrize("recompute", [{}, FULL_RECOMPUTE], ids=["none", "full"])
def test_stages_of_a_pipeline_have_their_gradients(recompute, expected):
    _, gradients, weights = expected
    num_targets = 2 * make_batch()["loss_mask"].sum()
    with RankPool(4) as pool:
        answers = pool.run(gradients_of_a_pipeline, recompute, weights)
    assert {name for answer in answers for name in answer} == set(gradients)
    for answer in answers:
        for name, gradient in answer.items():
            wanted = num_targets * gradients[name]
            assert (gradient - wanted).norm() < 1e-4 * wanted.norm(), name
