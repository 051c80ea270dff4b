# SPDX-License-Identifier: Apache-2.0
"""The rolls by the names that older code imports from here."""

from magi_attention.functional.dist import roll_func, roll_simple_func

roll_p2p, roll_simple_p2p = roll_func, roll_simple_func

__all__ = ["roll_func", "roll_p2p", "roll_simple_func", "roll_simple_p2p"]
