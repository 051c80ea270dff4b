# SPDX-License-Identifier: Apache-2.0
"""The programs of examples/ that need a training library run, on one process and on two, with the same numbers."""

import re

import pytest

from tests.core.test_demo_examples import EXAMPLES, numbers_printed, output_of

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.parametrize(
    ("module", "name"), [("megatron.core", "megatron_core.py"), ("torchtitan.models.llama3", "torchtitan_llama.py")]
)
def test_example_gives_the_same_on_one_process_and_on_two(module, name):
    pytest.importorskip(module, exc_type=ImportError)
    alone = numbers_printed([str(EXAMPLES / name)])
    assert len(alone) == 2
    assert numbers_printed([*TORCHRUN, str(EXAMPLES / name)]) == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("launcher", [[], TORCHRUN])
def test_a_transformers_model_has_the_gradients_of_its_own_attention(launcher):
    pytest.importorskip("transformers")
    output = output_of([*launcher, str(EXAMPLES / "hf_transformers.py")])
    assert float(re.search(r"of gradients (\S+)", output)[1]) < 1e-4
