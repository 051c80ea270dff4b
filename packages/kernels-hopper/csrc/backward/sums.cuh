// SPDX-License-Identifier: Apache-2.0
// Gradients of queries are added up in device memory, by all tiles of keys that meet them.
#pragma once

#include "../ptx/barrier.cuh"
#include "../ptx/cp_async_bulk.cuh"
#include "../ring.cuh"
#include "params.cuh"
#include "shared.cuh"

namespace magi::backward {

constexpr uint32_t kFirstTurn = 1;  // named barriers, one for each consumer; 0 is __syncthreads()

// One arrival of each warp; what the warp has read by products must have been waited for.
__device__ __forceinline__ void arrive_warp(uint64_t* barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(barrier);
}

__device__ __forceinline__ void wait_for_turn(uint32_t const* semaphore, uint32_t rank) {
    uint32_t reached;
    do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(reached) : "l"(semaphore) : "memory");
    } while (reached != rank);
}

__device__ __forceinline__ void give_turn(uint32_t* semaphore) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(semaphore) : "memory");
}

// Adds a part of the gradients, from a consumer's registers.
template <typename T>
__device__ __forceinline__ void add_dq(Params const& p, float const (&dq)[T::kDqRegisters], Target target, int group,
                                       int pass) {
    int64_t const part = static_cast<int64_t>(target.tile) * T::kDqParts + group;
    int const thread = threadIdx.x % 128;
    if (p.semaphores != nullptr && pass == 0) {
        if (thread == 0) wait_for_turn(p.semaphores + part, target.rank);
        ptx::barrier_sync(kFirstTurn + group, 128);
    }
    float* const sums = p.dq_sums + part * T::kDqFloats + pass * T::kDqRegisters * 128 + thread * 4;
#pragma unroll
    for (int i = 0; i < T::kDqRegisters; i += 4) {
        asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(sums + i * 128), "f"(dq[i]),
                     "f"(dq[i + 1]), "f"(dq[i + 2]), "f"(dq[i + 3])
                     : "memory");
    }
    if (p.semaphores != nullptr && pass == T::kDqPasses - 1) {
        __threadfence();
        ptx::barrier_sync(kFirstTurn + group, 128);
        if (thread == 0) give_turn(p.semaphores + part);
    }
}

// The parity of a consumer's part of the gradients of a step, which is counted by `step`.
template <typename T>
__device__ __forceinline__ uint32_t dq_parity(RingPlace<2> const& step) {
    return T::kDqAlternates ? step.parity() : step.stage();
}

// Hands a part of the gradients of a step over to the thread that adds them.
template <typename T>
__device__ __forceinline__ void hand_over_dq(Shared<T>& s, float const (&dq)[T::kDqRegisters], Target target,
                                             RingPlace<2> const& step, int group) {
    int const thread = threadIdx.x % 128;
    ptx::mbarrier_try_wait_parity(&s.dq_empty[group], dq_parity<T>(step) ^ 1);
    auto* const vectors = reinterpret_cast<float4*>(s.dq[group]) + thread;
#pragma unroll
    for (int i = 0; i < T::kDqRegisters; i += 4) {
        vectors[i / 4 * 128] = make_float4(dq[i], dq[i + 1], dq[i + 2], dq[i + 3]);
    }
    if (thread == 0) s.dq_target[group] = target;
    ptx::fence_proxy_async_shared();
    arrive_warp(&s.dq_full[group]);
}

// Tells that thread that there are none left: `step` is the next one of which there would be a part.
template <typename T>
__device__ __forceinline__ void finish_dq(Shared<T>& s, RingPlace<2> const& step, int group) {
    ptx::mbarrier_try_wait_parity(&s.dq_empty[group], dq_parity<T>(step) ^ 1);
    if (threadIdx.x % 128 == 0) s.dq_target[group].tile = -1;
    arrive_warp(&s.dq_full[group]);
}

}  // namespace magi::backward
