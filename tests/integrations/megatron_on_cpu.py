# SPDX-License-Identifier: Apache-2.0
"""Megatron-Core without a GPU, and the settings of its tests' models."""

from contextlib import ExitStack, contextmanager
from unittest import mock

import torch

OPTIONS = {
    "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "attention_dropout": 0.0,
    "use_cpu_initialization": True,
}  # fmt: skip


@contextmanager
def without_gpu():
    """Megatron moves rotary embeddings to a GPU and keeps GPU random states, even where nothing else needs one."""

    @contextmanager
    def fork(*_args):
        yield

    with ExitStack() as stack:
        for name, made in [
            ("torch.cuda.current_device", lambda: torch.device("cpu")),
            ("megatron.core.tensor_parallel.get_cuda_rng_tracker", lambda: mock.Mock(fork=fork)),
            ("megatron.core.tensor_parallel.random._get_all_rng_states", tuple),
            ("megatron.core.tensor_parallel.random._set_all_rng_states", lambda: None),
        ]:
            stack.enter_context(mock.patch(name, made))
        yield
