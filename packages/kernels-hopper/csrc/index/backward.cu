// SPDX-License-Identifier: Apache-2.0
// The kernels of a backward pass of index attention, of the head dims and so on that the compiler is told; variants.py
// lists them all.
#include "backward_kernel.cuh"
#include "backward_rows.cuh"
#include "unite.cuh"

using Traits = magi::index::BackwardTraits<MAGI_HEAD_DIM, MAGI_HEAD_DIM_V, MAGI_ELEMENT, MAGI_SOFTCAP, MAGI_STAGES,
                                           MAGI_BLOCKS, MAGI_CONSUMER_REGISTERS, MAGI_PRODUCER_REGISTERS>;

static_assert(sizeof(Traits::Shared) <= MAGI_SHARED_BYTES, "shared memory for the tiles");

extern "C" __global__ void __launch_bounds__(magi::index::kRowThreads)
    magi_index_backward_prepare(__grid_constant__ magi::index::TermsParams const params) {
    magi::index::prepare<Traits>(params);
}

extern "C" __global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    magi_index_backward(__grid_constant__ magi::index::BackwardParams const params) {
    magi::index::differentiate<Traits>(params);
}

extern "C" __global__ void __launch_bounds__(magi::index::kRowThreads)
    magi_index_backward_sum(__grid_constant__ magi::index::SumParams const params) {
    magi::index::sum_rows<Traits>(params);
}

extern "C" __global__ void __launch_bounds__(magi::index::kRowThreads)
    magi_index_backward_finish(__grid_constant__ magi::index::FinishParams const params) {
    magi::index::finish<Traits>(params);
}
