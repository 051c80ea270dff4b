# SPDX-License-Identifier: Apache-2.0
"""``magi plan``: plan a mask for any number of ranks, without any, and show what each would do."""
