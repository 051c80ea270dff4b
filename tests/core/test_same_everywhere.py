# SPDX-License-Identifier: Apache-2.0
"""Every rank plans for itself, so plans must not depend on the processor: numpy sorts by what a processor offers."""

import os
import subprocess
import sys

import numpy as np
import pytest

DIGEST = """
import hashlib
from magi_attention.common import workloads
from magi_attention.config import LocalityDispatchAlg
from magi_attention.plan import dispatch
from magi_attention.plan.dispatch import make_layout

dispatch.FEWEST_ROWS = 0
digest = hashlib.sha256()
for name in ("varlen_causal", "varlen_block_causal_4k", "prefix_lm", "shared_question"):
    for total, num_ranks in ((1 << 20, 128), (1 << 21, 256)):
        mask = workloads.make(name, total)
        for is_even in (True, False):
            layout = make_layout(
                mask,
                num_real=total,
                total=total,
                chunk_size=512,
                num_ranks=num_ranks,
                algorithm=LocalityDispatchAlg(),
                is_even=is_even,
            )
            digest.update(layout.runs.tobytes())
print(digest.hexdigest())
"""


def digest_without(features: list[str]) -> str:
    environment = {**os.environ, "NPY_DISABLE_CPU_FEATURES": " ".join(features)}
    run = subprocess.run([sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True, check=True)
    return run.stdout


def test_deals_are_the_same_on_every_processor():
    umath = np._core._multiarray_umath
    features = [each for each in umath.__cpu_dispatch__ if umath.__cpu_features__[each]]
    if not features:
        pytest.skip("numpy has nothing to choose from on this processor")
    assert digest_without(features) == digest_without([])
