# SPDX-License-Identifier: Apache-2.0
"""Environment variables of attention and planning. A switch is on if its text is ``1``."""

from importlib import metadata
from pathlib import Path

from magi_attention.common.enum import MagiAttentionKernelBackend, MagiAttentionPrecision
from magi_attention.env.variables import is_set, parse_choice, parse_flag, parse_folder, parse_int, variable

LOG_LEVELS = {"DEBUG": "DEBUG", "INFO": "INFO", "WARN": "WARNING", "WARNING": "WARNING", "ERROR": "ERROR"}
LOG_LEVELS["CRITICAL"] = "CRITICAL"


_FIXED_KERNEL_BACKENDS = [*map(str, MagiAttentionKernelBackend), "hopper", "blackwell", "cudnn_flex"]


def known_kernel_backends() -> list[str]:
    """The names that a kernel backend may be asked for by: the fixed ones and those of installed plug-ins."""
    installed = [entry.name for entry in metadata.entry_points(group="magi_attention.kernels")]
    return list(dict.fromkeys(_FIXED_KERNEL_BACKENDS + installed))


def is_known_kernel_backend(name: str) -> bool:
    """Whether a kernel backend may be asked for by ``name``; looks for plug-ins only if it isn't a fixed one."""
    return name in _FIXED_KERNEL_BACKENDS or name in known_kernel_backends()


@variable("MAGI_ATTENTION_SDPA_BACKEND")
def is_sdpa_backend_enable(text: str) -> bool:
    """Older form of ``MAGI_ATTENTION_KERNEL_BACKEND=sdpa``; 1 beside the newer form is an error."""
    return parse_flag(text)


@variable("MAGI_ATTENTION_FA4_BACKEND")
def is_fa4_backend_enable(text: str) -> bool:
    """Older form of ``MAGI_ATTENTION_KERNEL_BACKEND=fa4``; 1 beside the newer form is an error."""
    return parse_flag(text)


@variable("MAGI_ATTENTION_KERNEL_BACKEND", "auto")
def kernel_backend(text: str) -> str:
    """The attention kernels to use in both passes, in any case.

    auto (for each pass the fastest that support it), hopper (also called ffa), blackwell (also called fa4), cudnn_flex,
    flex, reference (also called sdpa and sdpa_ol), or the name of an installed plug-in.
    """
    older = {"sdpa": is_sdpa_backend_enable(), "fa4": is_fa4_backend_enable()}
    legacy = [name for name, enabled in older.items() if enabled]
    if len(legacy) > 1:
        raise ValueError("MAGI_ATTENTION_SDPA_BACKEND and MAGI_ATTENTION_FA4_BACKEND are both 1; set at most one")
    if legacy and is_set("MAGI_ATTENTION_KERNEL_BACKEND"):
        raise ValueError(f"MAGI_ATTENTION_{legacy[0].upper()}_BACKEND is 1 as well; set only one of the two")
    if legacy:
        return legacy[0]
    return text.lower() if is_known_kernel_backend(text.lower()) else parse_choice(text, known_kernel_backends())


@variable("MAGI_ATTENTION_KERNEL_BACKEND_BACKWARD", "same")
def kernel_backend_backward(text: str) -> str:
    """The attention kernels of the backward pass, by the same names; ``same`` for those of both passes."""
    if text.lower() == "same" or is_known_kernel_backend(text.lower()):
        return text.lower()
    return parse_choice(text, ["same", *known_kernel_backends()])


@variable("MAGI_ATTENTION_KERNEL_SPEEDS", "")
def kernel_speeds(text: str) -> str:
    """A JSON file of measured kernel speeds, which override those that the backends expect of themselves."""
    return text


@variable("MAGI_ATTENTION_PRECISION", "")
def precision(text: str) -> str:
    """The data type to compute in: bf16, fp16, fp32 or fp64; unset, that of the given tensors (``input``)."""
    return parse_choice(text, [*MagiAttentionPrecision, "input"]) if text else "input"


@variable("MAGI_ATTENTION_DETERMINISTIC_MODE")
def is_deterministic_mode_enable(text: str) -> bool:
    """Kernels and reductions that give the same bits in every run."""
    return parse_flag(text)


@variable("MAGI_ATTENTION_MIN_CHUNKS_PER_RANK", "8")
def min_chunks_per_rank(text: str) -> int:
    """The least number of chunks that each rank should get; it bounds the chunk size from above."""
    return parse_int(text, minimum=1)


@variable("MAGI_ATTENTION_DIST_ATTN_RUNTIME_DICT_SIZE", "1000")
def dist_attn_runtime_dict_size(text: str) -> int:
    """How many keys are kept planned for each process group; with 0 or less none can be used. Read at the first key."""
    return parse_int(text)


@variable("MAGI_ATTENTION_SKIP_OVERLAP_CHECK")
def is_overlap_check_skipped(text: str) -> bool:
    """Don't check, when a key is made, that no two slices keep a common (query, key) pair."""
    return parse_flag(text)


@variable("MAGI_ATTENTION_FLATTEN_HEAD_GROUPS")
def is_flatten_head_groups_enable(text: str) -> bool:
    """Recorded in the key, and excludes sink and max_logits; all heads share one plan nevertheless."""
    return parse_flag(text)


@variable("MAGI_ATTENTION_AUTO_RANGE_MERGE")
def is_auto_range_merge_enable(text: str) -> bool:
    """Recorded in the key for compatibility; kernels here merge slices as suits them, whatever it says."""
    return parse_flag(text)


@variable("MAGI_ATTENTION_FFA_FORWARD_SM_MARGIN", "")
def ffa_forward_sm_margin(text: str) -> int:
    """Multiprocessors that forward kernels leave to communication.

    Unset, 4 where ``CUDA_DEVICE_MAX_CONNECTIONS`` is above 1, for kernels beside which rows begin to travel. None are
    left by kernels that nothing travels beside, as in a group of one, or what has its multiprocessors already, and
    where native group collectives take none.
    """
    return _sm_margin(text)


@variable("MAGI_ATTENTION_FFA_BACKWARD_SM_MARGIN", "")
def ffa_backward_sm_margin(text: str) -> int:
    """Multiprocessors that backward kernels leave to communication; unset, as for the forward kernels."""
    return _sm_margin(text)


def _sm_margin(text: str) -> int:
    if text:
        return parse_int(text, minimum=0)
    return 4 if cuda_device_max_connections() > 1 else 0


@variable("CUDA_DEVICE_MAX_CONNECTIONS", "8")
def cuda_device_max_connections(text: str) -> int:
    """CUDA's number of hardware queues; 1 also means that kernels leave no multiprocessors to communication."""
    return parse_int(text, minimum=1)


@variable("XDG_CACHE_HOME", "~/.cache")
def user_cache_dir(text: str) -> Path:
    """The folder of the user's caches; this project's is in it unless ``MAGI_ATTENTION_CACHE_DIR`` names another."""
    return parse_folder(text)


@variable("MAGI_ATTENTION_CACHE_DIR", "")
def cache_dir(text: str) -> Path:
    """The folder of what is kept: machines' measured rates, native collectives' calibration, compiled kernels.

    Unset, ``magi_attention`` in ``XDG_CACHE_HOME``.
    """
    return parse_folder(text) if text else user_cache_dir() / "magi_attention"


@variable("MAGI_ATTENTION_MEASURE_RATES", "1")
def is_rate_measurement_enable(text: str) -> bool:
    """Measure this machine's rates if the first key with ``OverlapConfig(degree="auto")`` finds none in the cache.

    Otherwise round numbers for a device of this name stand in.
    """
    return parse_flag(text)


@variable("MAGI_ATTENTION_LOG_LEVEL", "WARN")
def log_level(text: str) -> str:
    """The level of what ``magi`` logs to stderr: DEBUG, INFO, WARN, ERROR or CRITICAL; imports configure no logging."""
    return LOG_LEVELS[parse_choice(text, [level.lower() for level in LOG_LEVELS]).upper()]


@variable("MAGI_ATTENTION_SANITY_CHECK")
def is_sanity_check_enable(text: str) -> bool:
    """Compare what ``dispatch`` is given on all ranks, and raise where it differs; to look for wrong data loaders."""
    return parse_flag(text)


@variable("MAGI_ATTENTION_CPP_BACKEND", ignored=True)
def is_cpp_backend_enable(text: str) -> bool:
    """Range classes in C++; this package has one implementation, in Python."""
    return parse_flag(text)


@variable("MAGI_ATTENTION_CATGQA", ignored=True)
def is_cat_gqa_enable(text: str) -> bool:
    """A layout of backward kernels for grouped query heads; here the kernels choose for themselves."""
    return parse_flag(text)


@variable("MAGI_ATTENTION_PROFILE_MODE", ignored=True)
def is_profile_mode_enable(text: str) -> bool:
    """Timing events in kernels; a profiler sees this package's kernels as they are."""
    return parse_flag(text)


@variable("MAGI_ATTENTION_TEST_WORLD_SIZE", "", ignored=True)
def world_size_filter(text: str) -> int | None:
    """Restricts an older test suite to one number of ranks; None if unset."""
    return parse_int(text, minimum=1) if text else None


@variable("MAGI_ATTENTION_PARAMETERIZE_RUN_IN_MP", ignored=True)
def is_parameterize_run_in_mp_enable(text: str) -> bool:
    """Makes an older test suite run its parameters in processes of their own."""
    return parse_flag(text)


@variable("MAGI_ATTENTION_UNITEST_PROFILE_MODE", ignored=True)
def is_unittest_profile_mode_enable(text: str) -> bool:
    """Makes an older test suite profile what it runs."""
    return parse_flag(text)
