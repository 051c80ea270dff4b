# SPDX-License-Identifier: Apache-2.0
"""What Megatron-Core's core attention, rotary embeddings and batches become, and what is refused."""

import warnings

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("megatron.core")

from examples.megatron_core import (
    VOCABULARY,
    make_batch,
    make_model,
)
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from magi_attention.config import DispatchConfig, DistAttnConfig, MinHeapDispatchAlg
from magi_attention.integrations.megatron import (
    DispatchedRotaryEmbedding,
    MagiCoreAttention,
    MagiPackedSeqParams,
    dispatch_batch,
    plan_packed_sequence,
    use_dispatched_positions,
)
from magi_attention.testing.distributed import RankPool
from tests.integrations.megatron_on_cpu import OPTIONS, without_gpu

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def single_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def test_layers_with_a_window_take_the_window_s_key(single_process):
    packed = PackedSeqParams(cu_seqlens_q=torch.tensor([0, 20, 32]))
    config = TransformerConfig(**OPTIONS, window_size=(3, 0), window_attn_skip_freq=2)
    params = plan_packed_sequence(packed, config)
    q, k, v = torch.randn(3, 32, 1, 4, 16)
    outs = []
    for layer_number in (1, 2):  # every second layer has none
        core = MagiCoreAttention(config, layer_number, AttnMaskType.causal, "self")
        outs.append(core(q, k, v, None, packed_seq_params=params))
    positions = torch.arange(32)
    documents = (positions >= 20).long()
    causal = (positions[:, None] >= positions) & (documents[:, None] == documents)
    for out, mask in zip(outs, (causal & (positions[:, None] - positions <= 3), causal), strict=True):
        heads = (x.transpose(0, 2).transpose(0, 1) for x in (q, k, v))
        dense = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask)
        torch.testing.assert_close(out, dense[0].transpose(0, 1).flatten(1)[:, None], rtol=1e-5, atol=1e-5)
    assert params.positions.tolist() == [*range(20), *range(12)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [(3, 0), (3, -1), (3, 3), (-1, 0), (-1, -1), (-1, 2)])
def test_windows_look_ahead_only_where_documents_aren_t_causal(single_process, window, causal):
    config = TransformerConfig(**OPTIONS, window_size=window)
    params = plan_packed_sequence(PackedSeqParams(cu_seqlens_q=torch.tensor([0, 20, 32])), config, causal=causal)
    q, k, v = torch.randn(3, 32, 1, 4, 16)
    mask_type = AttnMaskType.causal if causal else AttnMaskType.no_mask
    out = MagiCoreAttention(config, 1, mask_type, "self")(q, k, v, None, packed_seq_params=params)
    positions = torch.arange(32)
    documents = (positions >= 20).long()
    behind = positions[:, None] - positions
    left, right = (each if each >= 0 else 32 for each in window)
    mask = (documents[:, None] == documents) & (behind <= left) & (-behind <= (0 if causal else right))
    heads = (x.transpose(0, 2).transpose(0, 1) for x in (q, k, v))
    dense = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask)
    torch.testing.assert_close(out, dense[0].transpose(0, 1).flatten(1)[:, None], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softmax_type", ["off-by-one", "learnable"])
def test_sinks(single_process, softmax_type):
    config = TransformerConfig(**OPTIONS, softmax_type=softmax_type)
    core = MagiCoreAttention(config, 1, AttnMaskType.causal, "self")
    params = plan_packed_sequence(PackedSeqParams(cu_seqlens_q=torch.tensor([0, 32])), config)
    q, k, v = torch.randn(3, 32, 1, 4, 16)
    out = core(q, k, v, None, packed_seq_params=params)
    offset = core.softmax_offset if softmax_type == "learnable" else torch.zeros(4)
    scores = torch.einsum("qbhd,kbhd->hqk", q, k) / 4
    scores = scores.masked_fill(torch.ones(32, 32, dtype=torch.bool).triu(1), -torch.inf)
    weights = torch.cat([scores, offset[:, None, None].expand(4, 32, 1)], dim=2).softmax(2)[..., :-1]
    expected = torch.einsum("hqk,kbhd->qbhd", weights, v).flatten(2)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    if softmax_type == "learnable":
        expected.square().sum().backward()
        gradient, core.softmax_offset.grad = core.softmax_offset.grad, None
        out.square().sum().backward()
        torch.testing.assert_close(core.softmax_offset.grad, gradient, rtol=1e-4, atol=1e-5)
        (sharded,) = core.sharded_state_dict("decoder.").values()
        assert (sharded.key, sharded.global_shape) == ("decoder.softmax_offset", (4,))


def test_checkpoints_are_those_of_megatron_s_own_attention(single_process):
    model = make_model()
    own = GPTModel(model.config, get_gpt_layer_local_spec(), VOCABULARY, 512, position_embedding_type="rope")
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    assert model.sharded_state_dict(metadata=metadata).keys() == own.sharded_state_dict(metadata=metadata).keys()
    model.load_state_dict(own.state_dict() | {"rotary_pos_emb.inv_freq": torch.zeros(8)})  # as old ones have it


@pytest.mark.parametrize(
    "settings",
    [
        {"rotary_percent": 0.5},
        {"rotary_interleaved": True},
        {"seq_len_interpolation_factor": 3.0},
        {"rope_scaling": True},
    ],
)
def test_angles_are_megatron_s_own_at_the_rows_positions(single_process, settings):
    rotary = RotaryEmbedding(16, **{"rotary_percent": 1.0, "use_cpu_initialization": True, **settings})
    params = plan_packed_sequence(PackedSeqParams(cu_seqlens_q=torch.tensor([0, 20, 32])), TransformerConfig(**OPTIONS))
    dispatched = DispatchedRotaryEmbedding(rotary)
    with pytest.raises(ValueError, match="get_rotary_seq_len before"):
        dispatched(32)
    num_rows = dispatched.get_rotary_seq_len(None, None, None, None, params)
    with without_gpu():
        own = rotary.get_emb(32)
    torch.testing.assert_close(dispatched(num_rows), own[params.positions], rtol=0, atol=0)


def test_forgotten_positions_fail(single_process):
    config = TransformerConfig(**OPTIONS)
    spec = get_gpt_layer_local_spec()
    spec.submodules.self_attention.submodules.core_attention = MagiCoreAttention
    model = GPTModel(config, spec, VOCABULARY, 512, position_embedding_type="rope")
    batch = make_batch()
    params = plan_packed_sequence(PackedSeqParams(cu_seqlens_q=torch.tensor([0, 300, 512])), config)
    local = dispatch_batch(batch, params)
    with without_gpu(), pytest.raises(TypeError, match="NoneType"):
        model(local["tokens"], local["position_ids"], None, labels=local["labels"], packed_seq_params=params)


def errors_of_uneven_ranks(rank, world_size):
    """What 63 rows on two ranks raise, which are uneven or padded; some of them would suit one of the ranks."""
    parallel_state.initialize_model_parallel(context_parallel_size=world_size)
    uneven = DispatchConfig(chunk_size=4, uneven_shard=True, alg=MinHeapDispatchAlg())
    even = DispatchConfig(chunk_size=4)
    sequence_parallel = {"tensor_model_parallel_size": 4, "sequence_parallel": True}
    stages = {"pipeline_model_parallel_size": 2, "pipeline_dtype": torch.float32}

    def plan(total, settings, dispatch_config):
        packed = PackedSeqParams(cu_seqlens_q=torch.tensor([0, 40, total]))
        config = DistAttnConfig(dispatch_config=dispatch_config)
        return plan_packed_sequence(packed, TransformerConfig(**OPTIONS, **settings), dist_attn_config=config)

    messages = []
    try:
        for settings, dispatch_config in [(sequence_parallel, uneven), (stages, uneven), (stages, even)]:
            with pytest.raises(ValueError, match="parallel") as caught:
                plan(63, settings, dispatch_config)
            messages.append(str(caught.value))
        plan(63, stages | {"variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"}, even)
        plan(64, stages, even)
        return messages
    finally:
        parallel_state.destroy_model_parallel()


def test_all_ranks_refuse_rows_that_megatron_cannot_pass_on():
    with RankPool(2) as pool:
        first, second = pool.run(errors_of_uneven_ranks)
    assert first == second
    assert "sequence parallelism" in first[0]
    for message in first[1:]:
        assert "pipeline_model_parallel_size=2" in message
        assert "key.pad_size" in message


def plan_with_means(rank, world_size):
    parallel_state.initialize_model_parallel(context_parallel_size=world_size)
    packed = PackedSeqParams(cu_seqlens_q=torch.tensor([0, 40, 64]))
    sums, means = (TransformerConfig(**OPTIONS, calculate_per_token_loss=per_token) for per_token in (True, False))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plan_packed_sequence(packed, sums)
        with pytest.warns(UserWarning, match="calculate_per_token_loss=True"):
            plan_packed_sequence(packed, means)
    finally:
        parallel_state.destroy_model_parallel()


def rows_by_hybrid_context_parallelism(rank, world_size):
    parallel_state.initialize_model_parallel()  # each rank has a sequence of its own, but for what packed says
    packed = PackedSeqParams(cu_seqlens_q=torch.tensor([0, 64]), local_cp_size=2, cp_group=dist.group.WORLD)
    try:
        config = TransformerConfig(**OPTIONS, calculate_per_token_loss=True)
        return plan_packed_sequence(packed, config).positions.tolist()
    finally:
        parallel_state.destroy_model_parallel()


def test_the_group_of_a_packed_sequence_shares_it_out():
    with RankPool(2) as pool:
        first, second = pool.run(rows_by_hybrid_context_parallelism)
    assert sorted(first + second) == list(range(64))


def test_means_of_ranks_are_warned_of():
    with RankPool(2) as pool:
        pool.run(plan_with_means)


@pytest.mark.parametrize(
    ("packed", "error", "message"),
    [
        ({"cu_seqlens_q": [0, 32]}, TypeError, "cu_seqlens_q must be a 1-D tensor of integers, not list"),
        (
            {"cu_seqlens_q": torch.tensor([0, 8, 32]), "cu_seqlens_q_padded": torch.tensor([0, 32])},
            ValueError,
            "2 entries",
        ),
        (
            {"cu_seqlens_q": torch.tensor([0, 8, 25]), "cu_seqlens_q_padded": torch.tensor([0, 16, 32])},
            ValueError,
            "document 1 has 17 rows by cu_seqlens_q, but only 16",
        ),
    ],
)
def test_documents_that_contradict_themselves_are_refused(single_process, packed, error, message):
    with pytest.raises(error, match=message):
        plan_packed_sequence(PackedSeqParams(**packed), TransformerConfig(**OPTIONS))


def test_what_was_not_planned_for_the_model_is_refused(single_process):
    packed = PackedSeqParams(cu_seqlens_q=torch.tensor([0, 32]))
    q = torch.randn(32, 1, 4, 16)
    windowed = MagiCoreAttention(TransformerConfig(**OPTIONS, window_size=(3, 0)), 1, AttnMaskType.causal, "self")
    for planned in (None, (4, 0)):
        params = plan_packed_sequence(packed, TransformerConfig(**OPTIONS, window_size=planned))
        with pytest.raises(ValueError, match=r"the model's config has window_size=\(3, 0\), but"):
            windowed(q, q, q, None, packed_seq_params=params)
    with pytest.raises(ValueError, match="plan_packed_sequence"):
        dispatch_batch({}, MagiPackedSeqParams())


@pytest.mark.parametrize("causal", [True, False])
def test_layers_that_mask_in_another_way_than_planned_are_refused(single_process, causal):
    config = TransformerConfig(**OPTIONS)
    params = plan_packed_sequence(PackedSeqParams(cu_seqlens_q=torch.tensor([0, 32])), config, causal=causal)
    q = torch.randn(32, 1, 4, 16)
    own, others = [AttnMaskType.no_mask, AttnMaskType.padding], [AttnMaskType.causal, AttnMaskType.padding_causal]
    if causal:
        own, others = others, own
    for mask_type in others:
        core = MagiCoreAttention(config, 1, mask_type, "self")
        with pytest.raises(ValueError, match=f"attn_mask_type is {mask_type.name}, but .* with causal={causal}"):
            core(q, q, q, None, packed_seq_params=params)
    for mask_type in own:
        core = MagiCoreAttention(config, 1, mask_type, "self")
        assert core(q, q, q, None, packed_seq_params=params).shape == (32, 1, 64)
    with pytest.raises(ValueError, match="attn_mask_type arbitrary"):
        MagiCoreAttention(config, 1, AttnMaskType.arbitrary, "self")


def test_batches_keep_their_names(single_process):
    params = plan_packed_sequence(PackedSeqParams(cu_seqlens_q=torch.tensor([0, 32])), TransformerConfig(**OPTIONS))
    local = dispatch_batch({"tokens": torch.arange(32)[None], "labels": None}, params)
    assert local["labels"] is None
    assert local.keys() == {"tokens", "labels", "attention_mask", "position_ids"}


@pytest.mark.parametrize(
    ("name", "entry", "found"),
    [
        ("cu_seqlens", torch.tensor([[0, 20, 32]]), r"shape \(1, 3\)"),
        ("max_seqlen", torch.tensor([20]), r"shape \(1,\)"),
        ("local_cp_size", 2, "type int"),
        ("tokens", torch.zeros(1, 40, dtype=torch.long), r"shape \(1, 40\)"),
    ],
)
def test_what_does_not_belong_to_rows_of_the_sequence_is_named(single_process, name, entry, found):
    params = plan_packed_sequence(PackedSeqParams(cu_seqlens_q=torch.tensor([0, 20, 32])), TransformerConfig(**OPTIONS))
    with pytest.raises(ValueError, match=rf"batch\['{name}'\] has {found}; .* \[1, 32, \.\.\.\]: leave out"):
        dispatch_batch({name: entry}, params)


def padding_mask_of_a_rank(rank, world_size):
    parallel_state.initialize_model_parallel(context_parallel_size=world_size)
    try:
        config = TransformerConfig(**OPTIONS, calculate_per_token_loss=True)
        params = plan_packed_sequence(PackedSeqParams(cu_seqlens_q=torch.tensor([0, 63])), config)
        of_the_batch = torch.arange(63)[None] >= 60
        padding_mask = dispatch_batch({"padding_mask": of_the_batch}, params)["padding_mask"]
        return params.magi_key.pad_size, padding_mask.dtype, int(padding_mask.sum())
    finally:
        parallel_state.destroy_model_parallel()


def test_rows_that_the_planner_adds_are_padding_to_the_routers_of_experts():
    with RankPool(2) as pool:
        answers = pool.run(padding_mask_of_a_rank)
    pad_size = answers[0][0]
    assert pad_size > 0
    assert all(dtype == torch.bool for _, dtype, _ in answers)
    assert sum(num_rows for _, _, num_rows in answers) == 3 + pad_size


def test_what_is_not_supported_is_refused(single_process):
    for wrong in (
        {"attention_dropout": 0.1},
        {"apply_query_key_layer_scaling": True},
        {"experimental_attention_variant": "gated_delta_net"},
    ):
        config = TransformerConfig(**OPTIONS)
        vars(config).update(wrong)  # what the config itself checks needs further settings
        with pytest.raises(ValueError, match=next(iter(wrong))):
            MagiCoreAttention(config, 1, AttnMaskType.causal, "self")
    config = TransformerConfig(**OPTIONS)
    with pytest.raises(ValueError, match="use self attention"):
        MagiCoreAttention(config, 1, AttnMaskType.causal, "cross")
    core = MagiCoreAttention(config, 1, AttnMaskType.causal, "self")
    q = torch.randn(32, 1, 4, 16)
    with pytest.raises(ValueError, match="plan_packed_sequence"):
        core(q, q, q, None, packed_seq_params=PackedSeqParams(qkv_format="thd"))
    params = plan_packed_sequence(PackedSeqParams(cu_seqlens_q=torch.tensor([0, 32])), config)
    with pytest.raises(ValueError, match="call the model with attention_mask=None"):
        core(q, q, q, torch.ones(1, 1, 32, 32, dtype=torch.bool), packed_seq_params=params)
    with pytest.raises(ValueError, match="cu_seqlens_q"):
        plan_packed_sequence(PackedSeqParams(), config)
    with pytest.raises(ValueError, match=r"batch\['tokens'\] has shape \(2, 16\)"):
        dispatch_batch({"tokens": torch.zeros(2, 16)}, params)
    sizes = {"hidden_size": 96, "num_attention_heads": 6, "tensor_model_parallel_size": 3}
    sequence_parallel = TransformerConfig(**{**OPTIONS, **sizes}, sequence_parallel=True)
    with pytest.raises(ValueError, match=r"32 rows to 3 ranks: choose a DispatchConfig\(chunk_size"):
        plan_packed_sequence(PackedSeqParams(cu_seqlens_q=torch.tensor([0, 32])), sequence_parallel)
    yarn = torch.nn.Module()
    yarn.rotary_pos_emb = torch.nn.Identity()
    with pytest.raises(ValueError, match="only RotaryEmbedding"):
        use_dispatched_positions(yarn)


@pytest.mark.parametrize("name", ["conv1d", "conv1d_weight"])  # of Megatron-Core 0.16, and of its Mamba in 0.19
def test_models_with_layers_that_need_their_rows_in_order_are_refused(name):
    mixer = torch.nn.Module()
    convolution = torch.nn.Conv1d(8, 8, kernel_size=4, groups=8)
    setattr(mixer, name, convolution if name == "conv1d" else convolution.weight)
    model = torch.nn.Module()
    model.decoder = torch.nn.ModuleList([torch.nn.Linear(8, 8), mixer])
    with pytest.raises(ValueError, match=rf"convolution over the sequence \(decoder\.1\.{name}"):
        use_dispatched_positions(model)


def test_wrapped_models_are_not_taken_for_models_without_rotary_embeddings():
    wrapper = torch.nn.Module()
    use_dispatched_positions(wrapper)
    wrapper.module = torch.nn.Module()
    wrapper.module.rotary_pos_emb = RotaryEmbedding(16, rotary_percent=1.0, use_cpu_initialization=True)
    with pytest.raises(ValueError, match="pass the GPTModel itself"):
        use_dispatched_positions(wrapper)
