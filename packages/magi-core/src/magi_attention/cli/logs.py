# SPDX-License-Identifier: Apache-2.0
"""The log of the command-line tools."""

import logging
from importlib import metadata

from magi_attention.env import general
from magi_attention.env.variables import is_set

PLUGIN_GROUPS = ("magi_attention.kernels", "magi_attention.comm")


def log_to_stderr() -> None:
    """Log what ``MAGI_ATTENTION_LOG_LEVEL`` asks for, of this package and its plug-ins; unset, warnings as by default.

    Raises:
        ValueError: the variable is no level.
    """
    if not is_set("MAGI_ATTENTION_LOG_LEVEL"):
        return
    level = general.log_level()
    plugins = {point.module for group in PLUGIN_GROUPS for point in metadata.entry_points(group=group)}
    logging.basicConfig(format="%(processName)s %(levelname)s %(name)s: %(message)s")
    for module in {"magi_attention", *plugins}:
        logging.getLogger(module.partition(".")[0]).setLevel(level)
