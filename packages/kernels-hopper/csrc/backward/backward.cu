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
using OfPacks = magi::backward::TraitsOfPacks<MAGI_HEAD_DIM, MAGI_ELEMENT>;
using OfHeads = magi::backward::TraitsOfHeads<MAGI_HEAD_DIM, MAGI_ELEMENT>;

static_assert(!MAGI_SOFTCAP && MAGI_HEAD_DIM == MAGI_HEAD_DIM_V);
static_assert(sizeof(magi::backward::QueryShared<OfPacks>) <= MAGI_SHARED_BYTES, "shared memory for the tiles");
static_assert(2 * sizeof(magi::backward::QueryShared<OfHeads>) <= MAGI_SHARED_BYTES, "shared memory for two blocks");
static_assert(64 * OfPacks::kConsumers == MAGI_PACKS_ROWS && OfPacks::kBoxN == MAGI_PACKS_BOX &&
                  OfPacks::kThreads == MAGI_PACKS_THREADS && 64 * OfHeads::kConsumers == MAGI_HEADS_ROWS &&
                  OfHeads::kBoxN == MAGI_HEADS_BOX && OfHeads::kThreads == MAGI_HEADS_THREADS,
              "what the host assumes");

extern "C" __global__ void __launch_bounds__(OfPacks::kThreads, 1)
    magi_backward_queries(__grid_constant__ magi::backward::QueryParams const params) {
    magi::backward::differentiate_queries<Traits, OfPacks>(params);
}

extern "C" __global__ void __launch_bounds__(OfHeads::kThreads, 2)
    magi_backward_queries_of_heads(__grid_constant__ magi::backward::QueryParams const params) {
    magi::backward::differentiate_queries<Traits, OfHeads>(params);
}
#endif
