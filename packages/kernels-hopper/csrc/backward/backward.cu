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
using OfQueries = magi::backward::QueryTraits<MAGI_HEAD_DIM, MAGI_ELEMENT>;

static_assert(!MAGI_SOFTCAP && MAGI_HEAD_DIM == MAGI_HEAD_DIM_V);
static_assert(sizeof(magi::backward::QueryShared<OfQueries>) <= MAGI_SHARED_BYTES, "shared memory for the tiles");
static_assert(64 * OfQueries::kConsumers == MAGI_QUERIES_ROWS && OfQueries::kBoxN == MAGI_QUERIES_BOX &&
                  OfQueries::kThreads == magi::backward::kThreads,
              "what the host assumes");

extern "C" __global__ void __launch_bounds__(OfQueries::kThreads, 1)
    magi_backward_queries(__grid_constant__ magi::backward::QueryParams const params) {
    magi::backward::differentiate_queries<Traits, OfQueries>(params);
}
#endif
