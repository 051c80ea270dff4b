// SPDX-License-Identifier: Apache-2.0
// Barriers in shared memory, named as in the PTX manual. A phase completes when all arrivals and all bytes that were
// announced have come; waiting for parity p returns once the phase of that parity has completed.
#pragma once

#include <cstdint>

namespace magi::ptx {

__device__ __forceinline__ uint32_t shared_address(void const* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine; all threads need a barrier of their own after it.
__device__ __forceinline__ void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// One arrival of a warp, after all of its threads have come here. compute-sanitizer's racecheck doesn't see that one of
// them arrives for all; in kernels that are compiled for it, each arrives for itself.
#ifdef MAGI_FOR_RACECHECK
constexpr uint32_t kArrivalsOfWarp = 32;
#else
constexpr uint32_t kArrivalsOfWarp = 1;
#endif
__device__ __forceinline__ void mbarrier_arrive_warp(uint64_t* barrier) {
    __syncwarp();
    if (kArrivalsOfWarp == 32 || threadIdx.x % 32 == 0) mbarrier_arrive(barrier);
}

__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

// Whether the phase of a parity has completed.
__device__ __forceinline__ bool mbarrier_test_wait_parity(uint64_t* barrier, uint32_t parity) {
    uint32_t done;
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    return done != 0;
}

__device__ __forceinline__ void mbarrier_try_wait_parity(uint64_t* barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra finished;\n"
        "bra again;\n"
        "finished:\n"
        "}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

}  // namespace magi::ptx
