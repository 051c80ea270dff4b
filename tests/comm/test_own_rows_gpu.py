# SPDX-License-Identifier: Apache-2.0
"""A rank's own rows, copied on a GPU beside a kernel that would take all of it."""

import time

import numpy as np
import pytest
import torch

from magi_attention.comm.packing import row_formats
from magi_attention.comm.routes import places_of
from magi_comm_grpcoll.own import OwnCopies

# Goes on until it is released, or for some ten seconds, far more than the copies can take.
_FILL = """
extern "C" __global__ void __launch_bounds__(1024) fill(volatile int const* released) {
    long long const begun = clock64();
    while (!*released && clock64() - begun < 20000000000LL) {}
}
"""


@pytest.mark.gpu(1)
@pytest.mark.alone
def test_copies_have_their_multiprocessors_before_the_next_kernel_takes_all():
    """Both have been enqueued, and wait for the same stream, when the GPU comes to them."""
    if not hasattr(torch.cuda, "_compile_kernel"):
        pytest.skip("PyTorch compiles no kernels")
    fill, released = torch.cuda._compile_kernel(_FILL, "fill"), torch.zeros(1, dtype=torch.int32).pin_memory()
    device = torch.device("cuda", torch.cuda.current_device())
    num_blocks = 2 * torch.cuda.get_device_properties(device).multi_processor_count  # of half a multiprocessor each
    tensors = [torch.randn(8192, 8, 64, device=device).bfloat16(), torch.randn(8192, 512, device=device)]
    first = np.arange(16) * 1024
    places = places_of(np.column_stack([first, first + 512])[::-1], device)
    caller, stream = torch.cuda.Stream(), torch.cuda.Stream(priority=-1)
    copies = OwnCopies(places, row_formats(tensors), 16 * 1024, stream, device)
    assert copies.can_copy(tensors)
    for _ in range(10):
        received, ready, begun, done, filled = copies.new_buffers(), *(torch.cuda.Event() for _ in range(4))
        released.zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(caller):
            torch.cuda._sleep(5_000_000)  # until all that follows is enqueued
            ready.record(caller)
            stream.wait_event(ready)
            begun.record(stream)
            copies.enqueue([x.data_ptr() for x in tensors], received[0].data_ptr(), begun)
            done.record(stream)
            caller.wait_event(begun)
            fill(grid=(num_blocks, 1, 1), block=(1024, 1, 1), args=(released,))
            filled.record(caller)
        while not done.query() and not filled.query():
            time.sleep(1e-4)
        are_copied_first = not filled.query()
        released.fill_(1)
        torch.cuda.synchronize()
        assert are_copied_first
        for rows, mine in zip(received, tensors, strict=True):
            assert torch.equal(rows.view(16, 2, 512, *rows.shape[1:]).flip(0)[:, 0].flatten(0, 1), mine)
