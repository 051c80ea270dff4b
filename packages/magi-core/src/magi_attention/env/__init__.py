# SPDX-License-Identifier: Apache-2.0
"""The environment variables: one function for each, which reads it when called.

No other module reads ``os.environ``. ``VARIABLES`` lists all of them by name, with default and meaning.
"""

from magi_attention.env import build, comm, general
from magi_attention.env.variables import VARIABLES, Variable

__all__ = ["VARIABLES", "Variable", "build", "comm", "general"]
