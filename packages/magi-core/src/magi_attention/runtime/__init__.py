# SPDX-License-Identifier: Apache-2.0
"""Carrying out a plan: forward, backward, dispatch, roll, and the cache of planned keys."""
