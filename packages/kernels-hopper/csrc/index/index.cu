// SPDX-License-Identifier: Apache-2.0
// One kernel of index attention, of the head dims and so on that the compiler is told; variants.py lists them all.
#include "kernel.cuh"
#include "unite.cuh"

using Traits = magi::index::Traits<MAGI_HEAD_DIM, MAGI_HEAD_DIM_V, MAGI_ELEMENT, MAGI_SOFTCAP, MAGI_STAGES,
                                   MAGI_BLOCKS, MAGI_CONSUMER_REGISTERS, MAGI_PRODUCER_REGISTERS>;

static_assert(sizeof(Traits::Shared) <= MAGI_SHARED_BYTES, "shared memory for the tiles");

extern "C" __global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    magi_index(__grid_constant__ magi::index::Params const params) {
    magi::index::attend_to_indices<Traits>(params);
}
