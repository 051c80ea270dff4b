// SPDX-License-Identifier: Apache-2.0
// One forward kernel, of the head dims and so on that the compiler is told; variants.py lists them all.
#include "combine.cuh"
#include "kernel.cuh"

using Traits = magi::forward::Traits<MAGI_HEAD_DIM, MAGI_HEAD_DIM_V, MAGI_ELEMENT, MAGI_SOFTCAP, MAGI_CONSUMERS,
                                     MAGI_BOX_N, MAGI_STAGES, MAGI_STAGES_OUT, MAGI_SHRINKS_RARELY,
                                     MAGI_CONSUMER_REGISTERS, MAGI_PRODUCER_REGISTERS>;

static_assert(sizeof(magi::forward::Shared<Traits>) + 1024 <= MAGI_SHARED_BYTES, "shared memory for the tiles");

extern "C" __global__ void __launch_bounds__(Traits::kThreads, 1)
    magi_forward(__grid_constant__ magi::forward::Params const params) {
    magi::forward::forward<Traits>(params);
}

extern "C" __global__ void __launch_bounds__(magi::forward::kCombineThreads)
    magi_forward_combine(__grid_constant__ magi::forward::CombineParams const params) {
    magi::forward::combine<Traits::Element, Traits::kHeadDimV>(params);
}
