# SPDX-License-Identifier: Apache-2.0
"""Models of Transformers give the same logits and gradients with our attention as with their own."""

import os
from unittest import mock

import pytest
import torch

pytest.importorskip("transformers")

from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    DataCollatorWithFlattening,
    Gemma2Config,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    ModernBertConfig,
    PhimoeConfig,
    Qwen2MoeConfig,
    Qwen3Config,
    Trainer,
    TrainingArguments,
)

from magi_attention.api import (
    dispatch,
    get_position_ids,
    magi_attn_varlen_key,
    make_varlen_key_for_new_mask_after_dispatch,
    undispatch,
)
from magi_attention.integrations.transformers import attend, register
from magi_attention.testing.distributed import RankPool

pytestmark = pytest.mark.filterwarnings("ignore")
TOTAL, WINDOW = 60, 8
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "gemma2": Gemma2Config(**SIZES, sliding_window=WINDOW, query_pre_attn_scalar=8),  # windows, softcap, own scale
    "gpt_oss": GptOssConfig(**SIZES, sliding_window=WINDOW, num_local_experts=2, num_experts_per_tok=1),  # sinks
}
DTYPES = {"gpt_oss": torch.float32}  # experts take no float64


def make_model(name, attention):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        CONFIGS[name], attn_implementation=attention, dtype=DTYPES.get(name, torch.float64)
    )
    return model.train()


def tokens():
    return torch.randint(64, (TOTAL,), generator=torch.Generator().manual_seed(1))


def keys():
    key = magi_attn_varlen_key([0, TOTAL], [0, TOTAL], 4, 2, 8, 0, None, causal=True)
    window = (WINDOW - 1, 0)
    return key, make_varlen_key_for_new_mask_after_dispatch([0, TOTAL], [0, TOTAL], key, window_size=window)


def logits_and_gradients(rank, world_size, name, checkpointing=None):
    register()
    model = make_model(name, "magi")
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    key, window_key = keys()
    positions = get_position_ids(key)[None]
    logits = model(
        dispatch(tokens(), key)[None], position_ids=positions, use_cache=False, magi_key=key, magi_window_key=window_key
    ).logits[0]
    logits = undispatch(logits, key, is_partial_grad=True)
    (logits.square().mean() / world_size).backward()
    gradients = {n: each.grad for n, each in model.named_parameters() if each.grad is not None}
    for gradient in gradients.values() if world_size > 1 else ():
        torch.distributed.all_reduce(gradient)
    return logits.detach(), gradients


def own_logits_and_gradients(name):
    model = make_model(name, "eager")
    logits = model(tokens()[None], use_cache=False).logits[0]
    logits.square().mean().backward()
    return logits.detach(), {n: each.grad for n, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_gives_what_its_own_attention_gives(name, world_size):
    expected = own_logits_and_gradients(name)
    with RankPool(world_size) as pool:
        for logits, gradients in pool.run(logits_and_gradients, name):
            # Transformers takes its softmax in float32.
            torch.testing.assert_close(logits, expected[0], rtol=1e-4, atol=1e-5)
            assert gradients.keys() == expected[1].keys()
            for each, gradient in expected[1].items():
                assert (gradients[each] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-9, each


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(use_reentrant):
    plain = logits_and_gradients(0, 1, "llama")
    torch.testing.assert_close(logits_and_gradients(0, 1, "llama", use_reentrant), plain)


def call_without_positions(rank, world_size):
    register()
    key, _ = keys()
    with pytest.raises(ValueError, match=f"without position_ids, and took 0 to {len(get_position_ids(key)) - 1}"):
        make_model("llama", "magi")(dispatch(tokens(), key)[None], use_cache=False, magi_key=key)


def test_positions_that_a_model_makes_up_are_refused():
    with RankPool(2) as pool:
        pool.run(call_without_positions)


def test_positions_that_a_model_makes_up_are_right_on_one_process():
    register()
    key, _ = keys()
    logits = make_model("llama", "magi")(dispatch(tokens(), key)[None], use_cache=False, magi_key=key).logits[0]
    torch.testing.assert_close(undispatch(logits, key), own_logits_and_gradients("llama")[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "is_right"),
    [
        ([0, 1, 2, 3, 16, 17, 18], True),  # of the document that starts at 12, from its fifth row on
        ([4, 5, 6, 7, 8, 9, 10], True),
        ([0, 1, 2, 3, 18, 19, 20], False),
        ([16, 17, 18, 19, 20, 21, 22], False),
    ],
)
def test_positions_that_number_the_rows_of_several_documents_are_taken(rows, is_right):
    key = magi_attn_varlen_key([0, 4, 12, 36], [0, 4, 12, 36], 2, 2, 8, 0, None, causal=True)
    q = torch.randn(1, 2, 36, 8)
    positions = torch.arange(len(rows))[None]
    with mock.patch("magi_attention.integrations.transformers.get_position_ids", return_value=torch.tensor(rows)):
        if is_right:
            out, _ = attend(torch.nn.Identity(), q, q, q, None, magi_key=key, position_ids=positions)
            assert out.shape == (1, 36, 2, 8)
        else:
            with pytest.raises(ValueError, match="without position_ids"):
                attend(torch.nn.Identity(), q, q, q, None, magi_key=key, position_ids=positions)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("shape", [(1, TOTAL), (1, 1, TOTAL, TOTAL)])
def test_masks_given_to_a_model_are_refused(name, shape):
    register()
    key, window_key = keys()
    given = {"use_cache": False, "magi_key": key, "magi_window_key": window_key}
    with pytest.raises(ValueError, match="attention_mask"):
        make_model(name, "magi")(tokens()[None], attention_mask=torch.ones(shape), **given)


@pytest.mark.parametrize(
    "config",
    [
        BertConfig(**SIZES, is_decoder=True, add_cross_attention=True),
        BartConfig(
            vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32,
        ),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_models_with_cross_attention_are_refused(config):
    register()
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="magi").eval()
    other = (
        {"decoder_input_ids": tokens()[None]}
        if config.is_encoder_decoder
        else {"encoder_hidden_states": torch.randn(1, TOTAL, 32)}
    )
    key, _ = keys()
    with pytest.raises(ValueError, match="encoder-decoder or other cross-attention"):
        model(tokens()[None], use_cache=False, magi_key=key, **other)


def test_other_layers_than_those_of_full_or_sliding_attention_are_refused():
    register()
    sizes = SIZES | {"intermediate_size_mlp": 32, "num_local_experts": 2, "attention_chunk_size": 8}
    chunked = Llama4TextConfig(**sizes, no_rope_layers=[1, 0])
    assert set(chunked.layer_types) == {"chunked_attention", "full_attention"}
    model = AutoModelForCausalLM.from_config(chunked, attn_implementation="magi")
    key, _ = keys()
    with pytest.raises(ValueError, match="layers of chunked_attention"):
        model(tokens()[None], use_cache=False, magi_key=key)


@pytest.mark.parametrize("documents", [[0, TOTAL], [0, 5, 7, TOTAL]])
def test_windows_wider_than_the_layer_s_are_refused(documents):
    register()
    key = magi_attn_varlen_key(documents, documents, 4, 2, 8, 0, None, causal=True)
    model = make_model("gemma2", "magi")
    for too_many in (key, make_varlen_key_for_new_mask_after_dispatch(documents, documents, key, False, (WINDOW, 0))):
        with pytest.raises(ValueError, match=rf"window is {WINDOW} keys .* window_size=\({WINDOW - 1}, 0\)"):
            model(tokens()[None], use_cache=False, magi_key=key, magi_window_key=too_many)
    exact = make_varlen_key_for_new_mask_after_dispatch(documents, documents, key, False, (WINDOW - 1, 0))
    model(tokens()[None], use_cache=False, magi_key=key, magi_window_key=exact)


def test_windows_to_either_side():
    """ModernBERT's ``local_attention`` of 8 is 4 tokens to either side."""
    register()
    config = ModernBertConfig(**SIZES, local_attention=8, layer_types=["sliding_attention", "full_attention"])
    model = AutoModelForMaskedLM.from_config(config, attn_implementation="eager").eval()
    expected = model(tokens()[None]).logits
    model.set_attn_implementation("magi")
    key = magi_attn_varlen_key([0, TOTAL], [0, TOTAL], 4, 4, 8, 0, None)
    for window, fits in ((4, True), (5, False)):
        window_key = make_varlen_key_for_new_mask_after_dispatch([0, TOTAL], [0, TOTAL], key, False, (window, window))
        given = {"position_ids": get_position_ids(key)[None], "magi_key": key, "magi_window_key": window_key}
        if fits:
            logits = undispatch(model(dispatch(tokens(), key)[None], **given).logits[0], key)
            torch.testing.assert_close(logits, expected[0], rtol=1e-4, atol=1e-5)
        else:
            with pytest.raises(ValueError, match=r"window is 9 keys .* row see 11: make it with window_size=\(4, 4\)"):
                model(dispatch(tokens(), key)[None], **given)


@pytest.mark.parametrize(
    "config",
    [
        Qwen2MoeConfig(
            **SIZES, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, sliding_window=WINDOW,
            shared_expert_intermediate_size=16, use_sliding_window=True, max_window_layers=1,
            layer_types=["sliding_attention", "full_attention"],
        ),
        PhimoeConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1, sliding_window=WINDOW),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_windows_that_a_model_has_in_its_mask_alone(config):
    register()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    expected = model(tokens()[None], use_cache=False).logits
    model.set_attn_implementation("magi")
    key, window_key = keys()
    with pytest.raises(ValueError, match="a sliding window of 8 needs magi_window_key"):
        model(tokens()[None], use_cache=False, magi_key=key)
    logits = model(tokens()[None], use_cache=False, magi_key=key, magi_window_key=window_key).logits
    torch.testing.assert_close(logits[:, :TOTAL], expected, rtol=1e-4, atol=1e-5)


def test_compilers_need_no_break_for_windows():
    key, window_key = keys()
    module = torch.nn.Module()
    module.is_causal = True
    q, k, v = torch.randn(1, 4, TOTAL, 8), torch.randn(1, 2, TOTAL, 8), torch.randn(1, 2, TOTAL, 8)
    given = {"magi_key": key, "magi_window_key": window_key, "sliding_window": WINDOW}
    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(module, q, k, v, None, **given), attend(module, q, k, v, None, **given))


def test_what_would_be_ignored_is_refused():
    key, window_key = keys()
    q = torch.randn(1, 4, TOTAL, 8)
    module = torch.nn.Module()
    with pytest.raises(ValueError, match="no sliding window needs magi_key: call the model with magi_key="):
        attend(module, q, q, q, None)
    with pytest.raises(ValueError, match="a sliding window of 8 needs magi_window_key"):
        attend(module, q, q, q, None, magi_key=key, sliding_window=8)
    others = ("position_bias", "indices", "block_indices", "sinks")
    for wrong in ({"dropout": 0.1}, {"output_attentions": True}, *({name: q} for name in others)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            attend(module, q, q, q, None, magi_key=key, **wrong)
    with pytest.raises(ValueError, match="attention_mask"):
        attend(module, q, q, q, q, magi_key=key)
    two = q.expand(2, -1, -1, -1)
    with pytest.raises(ValueError, match="pack the 2 sequences"):
        attend(module, two, two, two, None, magi_key=key, magi_window_key=window_key)


def test_batches_of_flattened_documents():
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collate([{"input_ids": list(range(start, start + length))} for start, length in ((1, 12), (20, 7))])
    assert batch["cu_seq_lens_q"].tolist() == [0, 12, 19]
    labels = batch["labels"][0].roll(-1)
    assert labels.tolist() == [*range(2, 13), -100, *range(21, 27), -100]
    assert batch["position_ids"][0].tolist() == [*range(12), *range(7)]


def samples():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 30, (12,), generator=generator).tolist()
    return [{"input_ids": torch.randint(1, 64, (length,), generator=generator).tolist()} for length in lengths]


def collate_packed(samples):
    """This rank's rows of the samples, as documents of one sequence."""
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(samples)
    cu_seqlens = batch["cu_seq_lens_q"]
    key = magi_attn_varlen_key(cu_seqlens, cu_seqlens, 4, 2, 8, 0, None, causal=True)
    labels = dispatch(batch["labels"][0].roll(-1), key, pad_value=-100)[None]
    local = {name: dispatch(batch[name][0], key)[None] for name in ("input_ids", "position_ids")}
    return local | {"labels": labels, "shift_labels": labels, "magi_key": key}


def collate_padded(samples):
    """The samples below each other."""
    length = max(len(each["input_ids"]) for each in samples)
    rows = [(each["input_ids"], length - len(each["input_ids"])) for each in samples]
    return {
        "input_ids": torch.tensor([ids + [0] * missing for ids, missing in rows]),
        "labels": torch.tensor([ids + [-100] * missing for ids, missing in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * missing for ids, missing in rows]),
    }


class SameForAll(Trainer):
    """All processes are given all samples, in order."""

    def get_train_dataloader(self):
        return torch.utils.data.DataLoader(self.train_dataset, batch_size=3, collate_fn=self.data_collator)

    def get_eval_dataloader(self, eval_dataset=None):
        return self.get_train_dataloader()


def train_by_trainer(rank, world_size, attention, collate, folder):
    """The losses and norms of gradients of some steps of two batches each, and the loss of an evaluation after them."""
    register()
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    with mock.patch.dict(os.environ, {name: str(value) for name, value in ranks.items()}):
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=3, gradient_accumulation_steps=2, max_steps=2, logging_steps=1,
            learning_rate=0.01, use_cpu=True, remove_unused_columns=False, save_strategy="no", report_to=[],
            prediction_loss_only=True,
        )  # fmt: skip
        model = make_model("llama", attention)
        trainer = SameForAll(model, arguments, data_collator=collate, train_dataset=samples())
        trainer.train()
        eval_loss = trainer.evaluate()["eval_loss"]
    steps = [(each["loss"], each["grad_norm"]) for each in trainer.state.log_history if "loss" in each]
    return [*steps, (eval_loss,)]


def test_trainer_counts_targets_that_are_shifted_already(tmp_path):
    pytest.importorskip("accelerate")
    with RankPool(1) as pool:
        (expected,) = pool.run(train_by_trainer, "eager", collate_padded, str(tmp_path))
    assert len(expected) == 3
    with RankPool(2) as pool:
        for numbers in pool.run(train_by_trainer, "magi", collate_packed, str(tmp_path)):
            for step, wanted in zip(numbers, expected, strict=True):
                assert step == pytest.approx(wanted, rel=1e-5)
