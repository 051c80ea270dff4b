# SPDX-License-Identifier: Apache-2.0
"""The planner: from a mask to what each rank computes and exchanges, in numpy alone."""
