// SPDX-License-Identifier: Apache-2.0
// The backward kernels of the head dim and so on that the compiler is told; variants.py lists them all.
#include "kernel.cuh"
#include "rows.cuh"

using Traits = magi::backward::Traits<MAGI_HEAD_DIM, MAGI_HEAD_DIM_V, MAGI_ELEMENT, MAGI_SOFTCAP, MAGI_TILE_M, MAGI_STAGES, MAGI_FINE>;

static_assert(sizeof(magi::backward::Shared<Traits>) <= MAGI_SHARED_BYTES, "shared memory for the tiles");
static_assert(Traits::kTileN == MAGI_TILE_N && Traits::kDqParts == MAGI_DQ_PARTS, "what the host assumes");

extern "C" __global__ void __launch_bounds__(magi::backward::kThreads, 1)
    magi_backward(__grid_constant__ magi::backward::Params const params) {
    magi::backward::backward<Traits>(params);
}

extern "C" __global__ void __launch_bounds__(magi::backward::kRowThreads)
    magi_backward_prepare(__grid_constant__ magi::backward::RowParams const params) {
    magi::backward::prepare<Traits>(params);
}
