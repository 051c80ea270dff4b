# SPDX-License-Identifier: Apache-2.0
"""Every documented name can be imported by every documented path, with the documented parameters and defaults."""

import importlib
import inspect
import subprocess
import sys

import pytest

from magi_attention import api
from magi_attention.common.enum import AttnRole

API_FUNCTIONS = """magi_attn_varlen_key magi_attn_varlen_dispatch magi_attn_flex_key magi_attn_flex_dispatch dispatch
    undispatch roll roll_simple calc_attn clear_cache get_most_recent_key get_position_ids
    make_varlen_key_for_new_mask_after_dispatch make_flex_key_for_new_mask_after_dispatch"""
HELPERS = """compute_pad_size squash_batch_dim infer_varlen_mask_from_batch infer_attn_mask_from_sliding_window
    infer_attn_mask_from_cu_seqlens"""
CONFIGS = """DistAttnConfig DispatchConfig OverlapConfig GrpCollConfig DispatchAlg MinHeapDispatchAlg
    SequentialDispatchAlg SortedSequentialSelectAlg LBDispatchAlg
    DPDispatchAlg BSDispatchAlg OverlapAlg UniformOverlapAlg GreedyOverlapAlg"""
RUNTIME_MANAGER = """DistAttnRuntimeKey DistAttnRuntimeMgr DistAttnRuntimeDict init_dist_attn_runtime_key
    init_dist_attn_runtime_mgr"""

NAMES_BY_PATH = {
    "magi_attention.api": f"""{API_FUNCTIONS} {HELPERS} {CONFIGS} flex_flash_attn_func AttnForwardMeta AttnMaskType
        AttnOverlapMode AttnRanges DistAttnRuntimeKey GeneralAttnMaskType ToppHeapDispatchAlg DistAttnRuntimeDictManager
        dist_attn_runtime_dict_mgr""",
    "magi_attention": "config comm env functional init_dist_attn_runtime_key init_dist_attn_runtime_mgr __version__",
    "magi_attention.config": CONFIGS,
    "magi_attention.meta": "DispatchMeta make_dispatch_meta_from_qk_ranges",
    "magi_attention.meta.solver.dispatch_solver": "ToppHeapDispatchAlg MinHeapDispatchAlg DispatchAlg",
    "magi_attention.api.functools": f"{HELPERS} pad_at_dim unpad_at_dim apply_padding",
    "magi_attention.api.magi_attn_interface": f"""{API_FUNCTIONS} GeneralAttnMaskType dist_attn_runtime_dict_mgr
        DistAttnRuntimeDictManager""",
    "magi_attention.common": """AttnMask AttnMaskType AttnRange AttnRanges AttnRectangle AttnRectangles RangeError
        AttnForwardMeta range_op enum jit USE_CPP_BACKEND is_cpp_backend_enable""",
    "magi_attention.common.range": "AttnRange RangeError NaiveRange",
    "magi_attention.common.ranges": "AttnRanges NaiveRanges is_valid_cu_seqlens check_valid_cu_seqlens",
    "magi_attention.common.rectangle": "AttnRectangle",
    "magi_attention.common.rectangles": "AttnRectangles",
    "magi_attention.common.mask": "AttnMask",
    "magi_attention.common.enum": "AttnMaskType AttnOverlapMode AttnRole AttnType",
    "magi_attention.common.forward_meta": "AttnForwardMeta",
    "magi_attention.common.protocols": "",
    "magi_attention.dist_attn_runtime_mgr": RUNTIME_MANAGER,
    "magi_attention.functional": """flex_flash_attn_func ffa_fa4_func dist_attn_func dispatch_func undispatch_func
        roll_func roll_simple_func correct_attn_lse correct_attn_out correct_attn_out_lse correct_attn_lse_with_sink
        correct_attn_out_with_sink correct_attn_out_lse_with_sink""",
    "magi_attention.utils": "setup_dist_env clearup_dist_env make_attn_mask_from_ffa_args",
    "magi_attention.env.general": "",
    "magi_attention.env.comm": "",
    "magi_attention.env.build": "",
}

FLEX = """q_ranges k_ranges attn_mask_type total_seqlen_q total_seqlen_k num_heads_q num_heads_kv head_dim pad_size
    cp_group_or_mesh dist_attn_config=DistAttnConfig() is_same_source=True is_q_permutable=True is_k_permutable=True
    chunk_size=None"""
VARLEN = """cu_seqlens_q cu_seqlens_k num_heads_q num_heads_kv head_dim pad_size cp_group_or_mesh causal=False
    window_size=(-1,-1) dist_attn_config=DistAttnConfig() chunk_size=None is_same_source=True is_q_permutable=True
    is_k_permutable=True"""
KEY_FIELDS = """q_ranges k_ranges attn_mask_type total_seqlen_q total_seqlen_k num_heads_q num_heads_kv head_dim
    pad_size chunk_size cp_group cp_mesh dist_attn_config uneven_shard is_deterministic_mode_enable
    is_hierarchical_comm_enable is_qo_comm_enable is_native_grpcoll_enable is_flatten_head_groups_enable
    kernel_backend precision is_auto_range_merge_enable"""
PARAMETERS = {
    "magi_attn_flex_key": FLEX,
    "magi_attn_flex_dispatch": f"x {FLEX}",
    "magi_attn_varlen_key": VARLEN,
    "magi_attn_varlen_dispatch": f"x {VARLEN}",
    "dispatch": "x key pad_value=0.0 attn_role=AttnRole.QUERY",
    "undispatch": "x key is_partial_grad=False attn_role=AttnRole.QUERY",
    "roll": "x shift dim key attn_role=AttnRole.QUERY",
    "roll_simple": "x shift dim key attn_role=AttnRole.QUERY",
    "get_position_ids": "key device=None attn_role=AttnRole.QUERY",
    "calc_attn": "q k v key sink=None softmax_scale=None softcap=0.0 return_max_logits=False",
    "clear_cache": "cp_group=None",
    "get_most_recent_key": "cp_group",
    "make_flex_key_for_new_mask_after_dispatch": """q_ranges k_ranges attn_mask_type key_for_dispatch num_heads_q=None
        num_heads_kv=None head_dim=None dist_attn_config=None key_for_kv_dispatch=None""",
    "make_varlen_key_for_new_mask_after_dispatch": """cu_seqlens_q cu_seqlens_k key_for_dispatch causal=False
        window_size=(-1,-1) dist_attn_config=None key_for_kv_dispatch=None""",
    "compute_pad_size": "total_seqlen_q cp_size chunk_size",
    "squash_batch_dim": "x",
    "infer_varlen_mask_from_batch": "batch_size seq_len device='cuda'",
    "infer_attn_mask_from_sliding_window": "q_range k_range window_size",
    "infer_attn_mask_from_cu_seqlens": """cu_seqlens_q cu_seqlens_k causal=False window_size=(-1,-1)
        global_window_size=0""",
}


@pytest.mark.parametrize("path", NAMES_BY_PATH)
def test_names_import_by_their_paths(path):
    module = importlib.import_module(path)
    missing = [name for name in NAMES_BY_PATH[path].split() if not hasattr(module, name)]
    assert not missing


def test_all_lists_exactly_the_documented_names():
    assert sorted(api.__all__) == sorted(NAMES_BY_PATH["magi_attention.api"].split())
    assert len(set(api.__all__)) == 43


@pytest.mark.parametrize("path", NAMES_BY_PATH)
def test_paths_share_their_objects(path):
    module = importlib.import_module(path)
    shared = [name for name in NAMES_BY_PATH[path].split() if name in api.__all__]
    assert all(getattr(module, name) is getattr(api, name) for name in shared)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_and_defaults(name):
    expected = [each.partition("=") for each in PARAMETERS[name].split()]
    signature = inspect.signature(getattr(api, name)).parameters.values()
    assert [each.name for each in signature] == [name for name, _, _ in expected]
    for parameter, (_, has_default, default) in zip(signature, expected, strict=True):
        assert parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        wanted = eval(default, vars(api) | {"AttnRole": AttnRole}) if has_default else parameter.empty
        assert parameter.default == wanted


def test_key_fields_stand_in_the_documented_order():
    names = list(api.DistAttnRuntimeKey.__annotations__)
    assert names[: len(KEY_FIELDS.split())] == KEY_FIELDS.split()


def test_import_is_silent_and_brings_no_compiler():
    code = """
import logging, sys, warnings
import torch, torch.distributed
with_torch = set(sys.modules)
warnings.simplefilter("error")
import magi_attention.api
brought = {name.partition(".")[0] for name in set(sys.modules) - with_torch}
assert not brought & {"triton", "einops", "jinja2", "debugpy", "matplotlib", "typer", "rich"}, brought
assert not logging.getLogger("magi_attention").handlers
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
