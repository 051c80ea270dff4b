# SPDX-License-Identifier: Apache-2.0
"""``magi doctor``: what is here, what it can do, and whether it does it right."""
