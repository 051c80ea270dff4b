# SPDX-License-Identifier: Apache-2.0
"""``magi bench``: how long one distributed attention takes, and how much of its communication is hidden."""
