// SPDX-License-Identifier: Apache-2.0
// Copies of contiguous bytes between device memory and shared memory by the copy engine, also with addition.
#pragma once

#include "mbarrier.cuh"

namespace magi::ptx {

// Loads `bytes`, a multiple of 16, between addresses that are multiples of 16.
__device__ __forceinline__ void cp_async_bulk_load(void* target, void const* source, uint32_t bytes,
                                                   uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            shared_address(target)),
        "l"(source), "r"(bytes), "r"(shared_address(barrier))
        : "memory");
}

// Stores `bytes`, between addresses as above.
__device__ __forceinline__ void cp_async_bulk_store(void* target, void const* source, uint32_t bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(target), "r"(shared_address(source)),
                 "r"(bytes)
                 : "memory");
}

// Adds floats of shared memory to floats in device memory, element by element.
__device__ __forceinline__ void cp_reduce_async_bulk_add(float* target, void const* source, uint32_t bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(target),
                 "r"(shared_address(source)), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void cp_async_bulk_commit_group() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until at most `Pending` of the latest groups have still to read shared memory.
template <int Pending>
__device__ __forceinline__ void cp_async_bulk_wait_group_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}

// Waits until at most `Pending` of the latest groups have still to write.
template <int Pending>
__device__ __forceinline__ void cp_async_bulk_wait_group() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(Pending) : "memory");
}

// Orders this thread's accesses to shared memory before those of products and of the copy engine that follow a barrier.
__device__ __forceinline__ void fence_proxy_async_shared() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The same for its accesses to device memory, in both directions.
__device__ __forceinline__ void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

}  // namespace magi::ptx
