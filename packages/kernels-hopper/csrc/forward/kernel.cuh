// SPDX-License-Identifier: Apache-2.0
// The forward kernel. Each block takes tiles of queries from a common list until none is left. Its first warpgroup has
// the copy engine bring queries, keys and values; the others, the consumers, each compute 64 rows of the tile: scores by
// one product, their softmax, and a second product with the values. A consumer starts the scores of the next tile of
// keys before it multiplies the present probabilities, and consumers take turns in giving the tensor cores work, so that
// the softmax of one runs while the other's products do (as in FlashAttention-3, Shah et al., 2024).
#pragma once

#include "consumer.cuh"
#include "producer.cuh"

namespace magi::forward {

template <typename T>
__device__ __forceinline__ void forward(Params const& p) {
    extern __shared__ uint8_t memory[];
    auto& s = *reinterpret_cast<Shared<T>*>((reinterpret_cast<uintptr_t>(memory) + 1023) & ~uintptr_t{1023});
    int const warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
    bool const stages_out = T::kStagesOut && p.results.stages_out();
    if (threadIdx.x == 0) init_barriers(s, stages_out);
    __syncthreads();
    if (warpgroup == 0) {
        ptx::setmaxnreg_dec<T::kProducerRegisters>();
        int const warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
        if (ptx::elect_sync()) {
            if (warp == 0) {
                ptx::prefetch_tensormap(&p.q);
                ptx::prefetch_tensormap(&p.k);
                ptx::prefetch_tensormap(&p.v);
                Producer<T>{p, s}.run([](Item const&) {});
            } else if (warp == 1) {
                read_ahead<T>(p, s);
            } else if (warp == 2 && stages_out) {
                Writer<T>{p, s}.run();
            }
        }
    } else {
        ptx::setmaxnreg_inc<T::kConsumerRegisters>();
        Consumer<T>(p, s, warpgroup - 1).run();
    }
}

}  // namespace magi::forward
