# SPDX-License-Identifier: Apache-2.0
"""Compiled kernels as files that processes, users and machines may share.

The wheels' own code writes them as they are to be found, under locks, with host code for the processor that compiled
them. So a process that was killed or a full disk leaves part of a kernel, which fails in every later process; a file
system without locks lets every look-up wait and fail; and a machine with an older processor dies of its instructions.
What is here replaces it, without locks: files appear whole, and one that cannot be loaded is compiled anew.
"""

import logging
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from magi_kernels_blackwell.cache import cannot_keep

logger = logging.getLogger(__name__)

PROCESSORS = {"x86_64": "x86-64"}
"""LLVM's names of what every processor of a kind can do; "generic" for others."""


def share_objects(storage: Any) -> None:
    """Let a project's class of kernels on disk, ``JITPersistentCache``, read and write files as is told above."""
    storage._try_load_from_storage = load
    storage._try_export_to_storage = export


def load(kept: Any, key: object) -> bool:
    """Take a kernel from disk to memory; returns False if it is not there, or no whole kernel."""
    from cutlass import cute

    path = _path(kept, key)
    try:
        if not path.exists():
            return False
        kernel = getattr(cute.runtime.load_module(str(path), enable_tvm_ffi=True), kept.EXPORT_FUNCTION_PREFIX)
    except Exception as error:  # whatever the loader says of it
        logger.warning("%s holds no kernel that can be loaded, it is compiled anew: %s", path, error)
        return False
    kept.cache[key] = kernel
    return True


def export(kept: Any, key: object, kernel: Any) -> None:
    """Write a kernel to disk; if that fails, it remains in memory, and a warning tells."""
    path = _path(kept, key)
    unfinished = path.with_name(f".{path.stem}.{uuid4().hex}.o")
    try:
        for_any_processor(kernel.ir_module)
        kernel.export_to_c(object_file_path=str(unfinished), function_name=kept.EXPORT_FUNCTION_PREFIX)
        unfinished.replace(path)
    except Exception as error:  # a kernel that was compiled can be launched all the same
        cannot_keep(error.strerror if isinstance(error, OSError) and error.strerror else repr(error))
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


def for_any_processor(module: Any) -> None:
    """Let the host code of an MLIR module use no instructions but those that all processors of its kind have."""
    from cutlass._mlir import ir

    with module.context:
        processor = ir.StringAttr.get(PROCESSORS.get(platform.machine(), "generic"))
        no_more = ir.Attribute.parse("#llvm.target_features<[]>")
        for each in module.body.operations:
            if each.operation.name == "llvm.func":
                each.operation.attributes["target_cpu"] = processor
                each.operation.attributes["target_features"] = no_more


def _path(kept: Any, key: object) -> Path:
    return Path(kept.cache_path) / f"{kept._key_to_hash(key)}.o"
