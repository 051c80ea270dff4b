# SPDX-License-Identifier: Apache-2.0
"""Names by which older code imports what the planner is configured with."""
