// SPDX-License-Identifier: Apache-2.0
// Copies of tensor boxes between device memory and shared memory by the copy engine (TMA).
#pragma once

#include <cuda.h>

#include "mbarrier.cuh"

namespace magi::ptx {

// How long the L2 cache should keep what is read.
enum class CacheHint : uint64_t {
    kEvictNormal = 0x1000000000000000,
    kEvictFirst = 0x12F0000000000000,
    kEvictLast = 0x14F0000000000000,
};

__device__ __forceinline__ void prefetch_tensormap(CUtensorMap const* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(map)) : "memory");
}

// Loads the box that begins at (c0, c1, c2), the innermost coordinate first. What lies outside the tensor becomes 0.
__device__ __forceinline__ void cp_async_bulk_tensor_3d(
    void* target, CUtensorMap const* map, uint64_t* barrier, int c0, int c1, int c2, CacheHint hint) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(target)),
        "l"(reinterpret_cast<uint64_t>(map)), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2),
        "l"(static_cast<uint64_t>(hint))
        : "memory");
}

// Brings the box that begins at (c0, c1, c2) to the L2 cache.
__device__ __forceinline__ void cp_async_bulk_prefetch_tensor_3d(CUtensorMap const* map, int c0, int c1, int c2) {
    asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global.tile [%0, {%1, %2, %3}];" ::"l"(
                     reinterpret_cast<uint64_t>(map)),
                 "r"(c0), "r"(c1), "r"(c2)
                 : "memory");
}

// Stores the box that begins at (c0, c1, c2), without what lies outside the tensor.
__device__ __forceinline__ void cp_async_bulk_tensor_store_3d(CUtensorMap const* map, void const* source, int c0, int c1,
                                                              int c2) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(
                     reinterpret_cast<uint64_t>(map)),
                 "r"(shared_address(source)), "r"(c0), "r"(c1), "r"(c2)
                 : "memory");
}

}  // namespace magi::ptx
