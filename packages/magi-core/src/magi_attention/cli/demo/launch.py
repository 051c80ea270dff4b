# SPDX-License-Identifier: Apache-2.0
"""Start the ranks of the context-parallel run, and hear from them."""

import os
import pickle
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from magi_attention.cli.demo.options import DemoOptions
from magi_attention.cli.demo.train import StepResult, train
from magi_attention.cli.logs import log_to_stderr
from magi_attention.plan.build import Plan

POLL_SECONDS = 0.05


def train_on_ranks(
    documents: Sequence[bytes], options: DemoOptions, device: str, on_step: Callable[[StepResult], None]
) -> list[Plan]:
    """Train on ``options.processes`` new processes; ``on_step`` hears of rank 0's steps as they end.

    Returns each rank's plan of the last step.

    Raises:
        torch.multiprocessing.ProcessException: if a rank fails, with its traceback; the other ranks are ended.
    """
    events = mp.get_context("spawn").SimpleQueue()
    plans: dict[int, Plan] = {}
    with tempfile.TemporaryDirectory() as folder:
        # By a file: as arguments they would fill a pipe, and one of a rank that died at its start is never emptied.
        texts = Path(folder, "documents")
        texts.write_bytes(pickle.dumps(documents))
        arguments = (f"file://{folder}/rendezvous", texts, options, device, events)
        ranks = mp.start_processes(_run_rank, arguments, options.processes, join=False, start_method="spawn")
        try:
            finished = False
            while not finished:
                finished = ranks.join(timeout=POLL_SECONDS)
                while not events.empty():
                    event = events.get()
                    if isinstance(event, Plan):
                        plans[event.rank] = event
                    else:
                        on_step(event)
        finally:
            for process in ranks.processes:
                process.kill()
    return [plans[rank] for rank in range(options.processes)]


def _run_rank(
    rank: int,
    rendezvous: str,
    texts: Path,
    options: DemoOptions,
    device: str,
    events: "SimpleQueue[StepResult | Plan]",
) -> None:
    log_to_stderr()
    documents: list[bytes] = pickle.loads(texts.read_bytes())
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this machine, whatever its name resolves to
    place = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group(
        backend="nccl" if device == "cuda" else "gloo",
        init_method=rendezvous,
        rank=rank,
        world_size=options.processes,
        device_id=place if device == "cuda" else None,
    )
    try:
        tell = events.put if rank == 0 else lambda result: None
        events.put(train(documents, options, place, dist.group.WORLD, tell))
    finally:
        dist.destroy_process_group()
