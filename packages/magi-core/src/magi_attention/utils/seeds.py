# SPDX-License-Identifier: Apache-2.0
"""Seeds of random number generators."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def str2seed(text: str) -> int:
    """A seed that is the same for the same text in every process and run, below 2**32."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def set_random_seed(seed: int) -> None:
    """Seed the generators of Python, numpy and torch, on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def sync_rng(seed: int) -> Iterator[None]:
    """Seed torch's generators inside the block, so that ranks draw alike, and put them back afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
