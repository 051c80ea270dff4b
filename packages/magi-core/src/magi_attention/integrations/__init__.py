# SPDX-License-Identifier: Apache-2.0
"""Adapters for training libraries, one module each. A module needs its library; the rest of the package doesn't."""
