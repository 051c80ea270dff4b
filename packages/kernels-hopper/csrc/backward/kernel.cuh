// SPDX-License-Identifier: Apache-2.0
// The backward kernel. Each block takes tiles of keys from a common list until none is left, and for each of them meets
// all tiles of queries that see it, of all query heads that share its key head: gradients of keys and values stay in
// registers until they are complete, unless the packs of a head are several blocks' work. Those of queries are added up in
// device memory, by the copy engine, and converted as soon as they are complete.
#pragma once

#include "fine.cuh"
#include "narrow.cuh"
#include "producer.cuh"
#include "tall.cuh"
#include "wide.cuh"

namespace magi::backward {

// Of each thread. What the warps that move data lack is spilled, which does less harm to them than to consumers.
template <typename T>
constexpr uint32_t kProducerRegisters =
    T::kHeadDim == 192 ? 56 : T::kHeadDim == 128 || (T::kHeadDim == 256 && T::kSoftcap) ? 24 : 40;
template <typename T>
constexpr uint32_t kConsumerRegisters = (504 - kProducerRegisters<T>) / 2;

template <typename T>
__device__ __forceinline__ void init_barriers(Shared<T>& s) {
    constexpr uint32_t kOfOne = 4 * ptx::kArrivalsOfWarp, kOfAll = kConsumers * kOfOne;  // arrivals of consumers
    ptx::mbarrier_init(&s.k_full, 1);
    ptx::mbarrier_init(&s.v_full, 1);
    ptx::mbarrier_init(&s.kv_empty, kOfAll);
    for (int i = 0; i < T::kStages; i++) {
        ptx::mbarrier_init(&s.q_full[i], 1);
        ptx::mbarrier_init(&s.q_empty[i], T::kFine ? kOfOne : kOfAll);
        ptx::mbarrier_init(&s.dout_full[i], 1);
        ptx::mbarrier_init(&s.dout_empty[i], T::kFine ? kOfOne : kOfAll);
    }
    for (int i = 0; i < 2; i++) {
        ptx::mbarrier_init(&s.ds_full[i], T::kWide ? kOfOne : kOfAll);
        ptx::mbarrier_init(&s.ds_empty[i], T::kDqAlternates ? kOfOne : kOfAll);
        ptx::mbarrier_init(&s.item_full[i], 1);
        ptx::mbarrier_init(&s.item_empty[i], kOfAll);
    }
    if constexpr (T::kDqShared) {
        for (int i = 0; i < kConsumers; i++) {
            ptx::mbarrier_init(&s.dq_full[i], kOfOne);
            ptx::mbarrier_init(&s.dq_empty[i], 1);
        }
    }
    if constexpr (T::kWide) {
        for (int i = 0; i < 2; i++) {
            ptx::mbarrier_init(&s.p_full[i], kOfOne);
            ptx::mbarrier_init(&s.p_empty[i], kOfOne);
        }
    }
    ptx::fence_mbarrier_init();
}

// All warps that use the counters come here at last, one that loads and those that finish: the last of all leaves them as
// they were found. Fine kernels have nothing to finish.
template <typename T>
__device__ __forceinline__ void leave(Params const& p) {
    __threadfence();
    constexpr int kWarps = T::kFine ? 1 : 2 + 4 * kConsumers;  // of a block, that use them
    uint32_t const last = kWarps * gridDim.x - 1;
    if (atomicInc(reinterpret_cast<uint32_t*>(p.counters) + 1, last) != last) return;
    for (int i : {0, 2, 3}) atomicExch(p.counters + i, 0);
}

template <typename T>
__device__ __forceinline__ void backward(Params const& p) {
    extern __shared__ __align__(1024) uint8_t memory[];
    auto& s = *reinterpret_cast<Shared<T>*>(memory);
    int const warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    if (threadIdx.x == 0) init_barriers(s);
    __syncthreads();
    if (warp < 4) {
        ptx::setmaxnreg_dec<kProducerRegisters<T>>();
        if (warp == 3 && !T::kFine) {
            Finisher<T>{p}.template run<1>();
            if (ptx::elect_sync()) leave<T>(p);
        } else if (warp <= (T::kDqShared ? kConsumers : 0) && ptx::elect_sync()) {
            if (warp == 0) {
                Loader<T>{p, s}.run();
                leave<T>(p);
            } else if constexpr (T::kDqShared) {
                Reducer<T>{p, s, warp - 1}.run();
            }
        }
    } else {
        ptx::setmaxnreg_inc<kConsumerRegisters<T>>();
        using OfNarrow = std::conditional_t<T::kTall, TallConsumer<T>, NarrowConsumer<T>>;
        using OfOthers = std::conditional_t<T::kFine, FineConsumer<T>, OfNarrow>;
        using Consumer = std::conditional_t<T::kWide, WideConsumer<T>, OfOthers>;
        Consumer(p, s, warp / 4 - 1).run();
        // What this block's warp has not finished yet, or others' have not, is done by all that have nothing else to do.
        if constexpr (!T::kFine) {
            Finisher<T>{p}.template run<5>();
            if (ptx::elect_sync()) leave<T>(p);
        }
    }
}

}  // namespace magi::backward
