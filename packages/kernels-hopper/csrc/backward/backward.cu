// SPDX-License-Identifier: Apache-2.0
// The backward kernels of the head dim and so on that the compiler is told; variants.py lists them all.
#include "kernel.cuh"
#include "rows.cuh"
#if MAGI_FINE
#include "queries.cuh"
#endif

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

#if MAGI_FINE
using OfQueries =
    magi::forward::Traits<MAGI_HEAD_DIM, MAGI_HEAD_DIM_V, MAGI_ELEMENT, MAGI_SOFTCAP, 2, 64, 2, false, false, 240, 24>;

static_assert(sizeof(magi::backward::QueryShared<OfQueries>) <= MAGI_SHARED_BYTES, "shared memory for the tiles");

extern "C" __global__ void __launch_bounds__(OfQueries::kThreads, 1)
    magi_backward_queries(__grid_constant__ magi::backward::QueryParams const params) {
    magi::backward::differentiate_queries<Traits, OfQueries>(params);
}
#endif
