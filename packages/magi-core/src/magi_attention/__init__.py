# SPDX-License-Identifier: Apache-2.0
"""Context-parallel attention for ultra-long, packed, irregularly masked sequences.

Start at :mod:`magi_attention.api`: a mask given as slices becomes a key, with which tensors are dispatched, attended
and undispatched.
"""

from importlib.metadata import PackageNotFoundError, version

from magi_attention import comm, config, env, functional
from magi_attention.dist_attn_runtime_mgr import init_dist_attn_runtime_key, init_dist_attn_runtime_mgr

try:
    __version__: str | None = version("magi-attention")
except PackageNotFoundError:  # imported from a source tree that was never installed
    __version__ = None

__all__ = [
    "__version__",
    "comm",
    "config",
    "env",
    "functional",
    "init_dist_attn_runtime_key",
    "init_dist_attn_runtime_mgr",
]
