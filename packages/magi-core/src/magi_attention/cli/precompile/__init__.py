# SPDX-License-Identifier: Apache-2.0
"""``magi precompile``: fill the backends' kernel caches before the first step of a training does."""
