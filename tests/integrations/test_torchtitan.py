# SPDX-License-Identifier: Apache-2.0
"""A torchtitan Llama with our inner attention has the gradients that it has with dense attention."""

import re
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("torchtitan.models.llama3", exc_type=ImportError)

from examples.torchtitan_llama import VOCABULARY, loss_and_norm, make_batch, make_config, make_model, step
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.models.gpt_oss import gptoss_configs
from torchtitan.models.llama3 import parallelize
from torchtitan.models.llama3.sharding import set_llama3_sharding_config
from torchtitan.protocols.module import Module

from magi_attention.api import undispatch
from magi_attention.integrations.torchtitan import MagiInnerAttention, prepare_input
from magi_attention.testing.distributed import RankPool

pytestmark = pytest.mark.filterwarnings("ignore")
PAGE = Path(__file__).parents[2] / "docs" / "integrations" / "torchtitan.md"
SPMD_BACKEND = "partial_dtensor"


class DenseAttention(Module):
    """The same mask, as torchtitan's batch has it."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        pass

    def __init__(self, config):
        super().__init__()

    def forward(self, q, k, v, *, attention_masks, scale=None, enable_gqa=False, out_transform=None):
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
        scores = torch.einsum("bqnh,bknh->bnqk", q, k) * (scale or q.shape[3] ** -0.5)
        scores = scores.masked_fill(~attention_masks, -torch.inf)
        out = torch.einsum("bnqk,bknh->bqnh", scores.softmax(3), v)
        return out if out_transform is None else out_transform(out, scores.logsumexp(3).transpose(1, 2))


def dense_step():
    config = make_config()
    for layer in config.layers:
        layer.attention.inner_attention = DenseAttention.Config()
    model = make_model(config)
    inputs, labels, positions = make_batch(config)
    documents = (positions == 0).cumsum(1)
    causal = torch.ones(positions.shape[1], positions.shape[1], dtype=torch.bool).tril()
    mask = ((documents[:, :, None] == documents[:, None]) & causal)[:, None]
    logits = model(inputs, positions=positions, attention_masks=mask)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
    loss.backward()
    return float(loss), float(torch.stack([each.grad.double().norm() for each in model.parameters()]).norm())


def step_of_rank(rank, world_size):
    return step(init_device_mesh("cpu", (world_size,), mesh_dim_names=("cp",)))


def step_of_torchtitan_s_own_sharding(rank, world_size, precision="float32", tp=1, enable_sp=False):
    cp = world_size // tp
    dims = ParallelDims(
        dp_replicate=1, dp_shard=1, cp=cp, tp=tp, pp=1, ep=1, world_size=world_size, spmd_backend=SPMD_BACKEND
    )
    with mock.patch("torchtitan.distributed.parallel_dims.device_type", "cpu"):
        dims.build_mesh()
    config = make_config()
    set_llama3_sharding_config(config, enable_sp=enable_sp)  # as the trainer does
    with mock.patch.object(parallelize, "apply_cp_to_forward"):
        model = parallelize.parallelize_llama(
            make_model(config),
            parallel_dims=dims,
            training=TrainingConfig(mixed_precision_param=precision),
            parallelism=ParallelismConfig(
                context_parallel_degree=cp, tensor_parallel_degree=tp, spmd_backend=SPMD_BACKEND
            ),
            compile_config=CompileConfig(),
            ac_config=None,
            dump_folder="",
        )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other one
    if tp > 1:
        model.register_forward_hook(lambda _, __, logits: logits.full_tensor())  # sharded over the vocabulary
    return loss_and_norm(model, config, dims.get_mesh("cp"))


@pytest.mark.parametrize(
    ("world_size", "take_step"), [(1, step_of_rank), (2, step_of_rank), (2, step_of_torchtitan_s_own_sharding)]
)
def test_a_step_is_that_of_dense_attention(world_size, take_step):
    with RankPool(world_size) as pool:
        for answer in pool.run(take_step):
            assert answer == pytest.approx(dense_step(), rel=1e-4)


@pytest.mark.parametrize("enable_sp", [False, True])
def test_a_step_in_tensor_parallelism_is_that_of_dense_attention(enable_sp):
    with RankPool(4) as pool:
        for answer in pool.run(step_of_torchtitan_s_own_sharding, "float32", 2, enable_sp):
            assert answer == pytest.approx(dense_step(), rel=1e-4)


def test_a_step_in_torchtitan_s_mixed_precision_is_about_that():
    with RankPool(2) as pool:
        for answer in pool.run(step_of_torchtitan_s_own_sharding, "bfloat16"):
            assert answer == pytest.approx(dense_step(), rel=1e-2)


WINDOW = 16
MASKS = {"basic_mask": None, "sliding_window_mask": WINDOW}  # as layers of gpt_oss look them up


def gpt_oss_gradients(inner_attention, call):
    """The gradients of two layers, one with a window, without their experts; ``call`` has the model's logits."""
    config = gptoss_configs["debugmodel"]("standard")
    config.layers = config.layers[:2]
    for layer in config.layers:
        layer.attention.inner_attention = inner_attention
    model = make_model(config)
    for layer in model.layers.values():
        layer.moe = torch.nn.Identity()
        torch.nn.init.normal_(layer.attention.sinks)
    call(model, config.layers[0].attention).square().mean().backward()
    return {name: each.grad for name, each in model.named_parameters()}


def packed_row():
    """Tokens and positions of two documents, of a number of rows that two ranks have not equally many of."""
    tokens = torch.randint(VOCABULARY, (1, 151), generator=torch.Generator().manual_seed(1))
    return tokens, torch.cat([torch.arange(100), torch.arange(51)])[None]


def gpt_oss_gradients_of_rank(rank, world_size):
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("cp",))
    tokens, positions = packed_row()

    def call(model, attention):
        heads = attention.n_heads, attention.n_kv_heads
        inputs, _, kwargs = prepare_input(
            tokens, tokens, {"positions": positions}, mesh, heads, attention.head_dim, windows=MASKS
        )
        assert kwargs["attention_masks"].keys() == MASKS.keys()
        return undispatch(model(inputs, **kwargs)[0], kwargs["attention_masks"]["basic_mask"])

    gradients = gpt_oss_gradients(MagiInnerAttention.Config(), call)
    for each in gradients.values():
        torch.distributed.all_reduce(each)
    return gradients


def test_sinks_and_windows_of_gpt_oss():
    tokens, positions = packed_row()
    documents = (positions == 0).cumsum(1)[0]
    behind = positions[0, :, None] - positions[0]
    causal = (documents[:, None] == documents) & (behind >= 0)
    masks = {"basic_mask": causal, "sliding_window_mask": causal & (behind < WINDOW)}
    expected = gpt_oss_gradients(
        DenseAttention.Config(), lambda model, _: model(tokens, positions=positions, attention_masks=masks)
    )
    assert expected["layers.0.attention.sinks"].norm() > 0
    with RankPool(2) as pool:
        for gradients in pool.run(gpt_oss_gradients_of_rank):
            assert gradients.keys() == expected.keys()
            for name, gradient in expected.items():
                assert (gradients[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


def test_arguments_that_would_change_the_result_are_not_taken():
    q = torch.randn(1, 6, 4, 8)
    _, _, kwargs = prepare_input(torch.zeros(1, 6), torch.zeros(1, 6), {}, None, (4, 4), 8)
    with pytest.raises(TypeError, match="score_mod"):
        MagiInnerAttention()(q, q, q, attention_masks=kwargs["attention_masks"], score_mod=lambda score, *_: score)


def test_the_config_of_the_page_builds_its_trainer():
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    namespace = {"__name__": __name__}
    with mock.patch.object(parallelize, "apply_cp_to_forward"):
        exec(block, namespace)
    config = namespace["llama3_8b_magi"]()
    with mock.patch.object(namespace["MagiTrainer"], "__init__", return_value=None):
        assert type(config.build()) is namespace["MagiTrainer"]
    for layer in config.model_spec.model.layers:
        assert type(layer.attention.inner_attention) is MagiInnerAttention.Config
        assert (layer.attention.n_heads, layer.attention.n_kv_heads) == (32, 8)  # as the page has them


def test_rows_of_the_batch_are_documents_even_without_positions():
    inputs = torch.arange(12).view(2, 6)
    local, labels, kwargs = prepare_input(inputs, inputs + 1, {"other": 3}, None, (4, 2), 8)
    assert local.shape == labels.shape == kwargs["positions"].shape
    assert local[0, :12].tolist() == list(range(12))
    assert kwargs["positions"][0, :12].tolist() == [*range(6), *range(6)]
    assert kwargs["other"] == 3
    assert len(kwargs["attention_masks"].q_ranges) >= 2


def prepare_as_a_replica(rank, world_size):
    """The batch of each replica is its own: all rows, and its own document boundaries."""
    inputs = torch.arange(12).view(2, 6) + 100 * rank
    attention = MagiInnerAttention()
    group_ranks, outs = set(), []
    for _ in range(2):
        local, labels, kwargs = prepare_input(inputs, inputs + 1, {}, None, (2, 2), 8)
        q = F.one_hot(local % 100, 16)[..., None, :8].float().expand(1, local.shape[1], 2, 8)
        outs.append(attention(q, q, q + rank, attention_masks=kwargs["attention_masks"]))
        group_ranks.add(kwargs["attention_masks"].group_ranks)
    return local.tolist(), labels.tolist(), group_ranks, [out.mean().item() for out in outs]


def test_without_a_mesh_each_process_has_its_whole_batch():
    with RankPool(2) as pool:
        answers = pool.run(prepare_as_a_replica)
    for rank, (local, labels, group_ranks, outs) in enumerate(answers):
        assert local[0][:12] == [100 * rank + each for each in range(12)]
        assert labels[0][:12] == [100 * rank + each + 1 for each in range(12)]
        assert group_ranks == {(rank,)}
        assert outs == pytest.approx([answers[0][3][0] + rank] * 2)


def test_wrong_arguments_are_refused():
    q = torch.randn(2, 6, 4, 8)
    with pytest.raises(ValueError, match="prepare_input"):
        MagiInnerAttention()(q, q, q)
    _, _, kwargs = prepare_input(torch.zeros(1, 6), torch.zeros(1, 6), {}, None, (4, 4), 8)
    with pytest.raises(ValueError, match="pack the 2 sequences"):
        MagiInnerAttention()(q, q, q, attention_masks=kwargs["attention_masks"])
    with pytest.raises(ValueError, match=r"extra_kwargs \['token_types'\]"):
        prepare_input(torch.zeros(1, 6), torch.zeros(1, 6), {"token_types": torch.zeros(1, 6)}, None, (4, 4), 8)
