# SPDX-License-Identifier: Apache-2.0
"""Environment variables of compilation. Most once steered a compiler that is no part of this package: ignored."""

from pathlib import Path

from magi_attention.env.general import cache_dir
from magi_attention.env.variables import parse_flag, parse_folder, parse_int, variable


@variable("MAGI_ATTENTION_NO_BUILD_CACHE", ignored=True)
def is_no_build_cache_enable(text: str) -> bool:
    """Compile kernels anew in every process."""
    return parse_flag(text)


@variable("MAGI_ATTENTION_WORKSPACE_BASE", "$HOME", ignored=True)
def workspace_base(text: str) -> str:
    """The folder for compiled kernels."""
    return text


@variable("MAGI_ATTENTION_FORCE_JIT_BUILD", ignored=True)
def is_force_jit_build_enable(text: str) -> bool:
    """Compile kernels even where compiled ones are installed."""
    return parse_flag(text)


@variable("MAGI_ATTENTION_BUILD_VERBOSE", ignored=True)
def is_build_verbose_enable(text: str) -> bool:
    """Show the compiler's commands."""
    return parse_flag(text)


@variable("MAGI_ATTENTION_BUILD_DEBUG", ignored=True)
def is_build_debug_enable(text: str) -> bool:
    """Compile kernels with debug information."""
    return parse_flag(text)


@variable("NVCC_THREADS", "4", ignored=True)
def nvcc_threads(text: str) -> int:
    """The CUDA compiler's threads."""
    return parse_int(text)


@variable("MAGI_ATTENTION_PREBUILD_FFA", "1", ignored=True)
def is_prebuild_ffa_enable(text: str) -> bool:
    """Compile the common kernels into the wheel."""
    return parse_flag(text)


@variable("MAGI_ATTENTION_PREBUILD_FFA_JOBS", "", ignored=True)
def prebuild_ffa_jobs(text: str) -> str:
    """The number of kernels compiled at a time into the wheel."""
    return text


@variable("MAX_JOBS", "", ignored=True)
def max_jobs(text: str) -> str:
    """The number of compilers at a time."""
    return text


@variable("MAGI_ATTENTION_SKIP_CUDA_BUILD", ignored=True)
def is_skip_cuda_build_enable(text: str) -> bool:
    """Build a wheel without kernels."""
    return parse_flag(text)


@variable("MAGI_ATTENTION_SKIP_MAGI_ATTN_EXT_BUILD", ignored=True)
def is_skip_magi_attn_ext_build_enable(text: str) -> bool:
    """Build a wheel without the C++ range classes."""
    return parse_flag(text)


@variable("MAGI_ATTENTION_SKIP_MAGI_ATTN_COMM_BUILD", ignored=True)
def is_skip_magi_attn_comm_build_enable(text: str) -> bool:
    """Build a wheel without native collectives."""
    return parse_flag(text)


@variable("MAGI_ATTENTION_BUILD_COMPUTE_CAPABILITY", "", ignored=True)
def build_compute_capability(text: str) -> str:
    """The GPU architectures to compile for."""
    return text


@variable("MAGI_ATTENTION_ALLOW_BUILD_WITH_CUDA12", ignored=True)
def is_build_with_cuda12_allowed(text: str) -> bool:
    """Build with CUDA 12 as well."""
    return parse_flag(text)


@variable("MAGI_ATTENTION_FORCE_CXX11_ABI", ignored=True)
def is_force_cxx11_abi_enable(text: str) -> bool:
    """Compile for the newer C++ ABI."""
    return parse_flag(text)


@variable("MAGI_ATTENTION_FFA_FA4_CACHE_DIR", "")
def ffa_fa4_cache_dir(text: str) -> Path | None:
    """The folder for kernels that backends compile, filled by ``magi precompile``.

    Unset, ``cute_kernels`` in ``MAGI_ATTENTION_CACHE_DIR``.
    """
    return parse_folder(text) if text else None


def kernel_cache_dir() -> Path:
    """The folder for kernels that backends compile; by default one in :func:`~magi_attention.env.general.cache_dir`."""
    return ffa_fa4_cache_dir() or cache_dir() / "cute_kernels"


@variable("NVSHMEM_DIR", "", ignored=True)
def nvshmem_dir(text: str) -> str:
    """Where NVSHMEM is installed."""
    return text
