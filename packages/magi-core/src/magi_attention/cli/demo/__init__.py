# SPDX-License-Identifier: Apache-2.0
"""``magi demo``: train a small model on one process and on several, and compare."""
