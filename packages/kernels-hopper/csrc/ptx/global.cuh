// SPDX-License-Identifier: Apache-2.0
// Accesses to device memory by which the threads of a GPU agree.
#pragma once

#include <cstdint>

namespace magi::ptx {

// What is stored becomes visible after all that this thread, and threads that it has synchronized with, did before.
__device__ __forceinline__ void store_release(int* address, int value) {
    asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

__device__ __forceinline__ int load_acquire(int const* address) {
    int value;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}

// Loads what never changes while the kernel runs, which the L1 cache keeps for long.
__device__ __forceinline__ int4 load_to_keep(int4 const* address) {
    int4 value;
    asm volatile("ld.global.nc.L1::evict_last.v4.s32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(address));
    return value;
}

// Returns what was there before.
__device__ __forceinline__ int add_acquire_release(int* address, int value) {
    int before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(before) : "l"(address), "r"(value) : "memory");
    return before;
}

// The same for streams that wait for the word, too; what was there before is not asked for.
__device__ __forceinline__ void add_release_system(int* address, int value) {
    asm volatile("red.release.sys.global.add.s32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

// Stores `value` if `expected` is there; returns what was there before.
__device__ __forceinline__ int compare_swap_acquire(int* address, int expected, int value) {
    int before;
    asm volatile("atom.acquire.gpu.global.cas.b32 %0, [%1], %2, %3;"
                 : "=r"(before)
                 : "l"(address), "r"(expected), "r"(value)
                 : "memory");
    return before;
}

// Waits until what is there is not 0, and returns it.
__device__ __forceinline__ int wait_until_set(int const* address) {
    int value;
    while ((value = load_acquire(address)) == 0) __nanosleep(200);
    return value;
}

// Loads what is not needed again.
__device__ __forceinline__ float4 load_once(float4 const* address) {
    float4 v;
    asm volatile("ld.global.L1::no_allocate.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(address)
                 : "memory");
    return v;
}

// Drops the 128 bytes at an address that is a multiple of 128 from the L2 cache: what they were is undefined from then on.
__device__ __forceinline__ void discard_l2(void const* address) {
    asm volatile("discard.global.L2 [%0], 128;" ::"l"(address) : "memory");
}

// Adds two or four floats to neighbors, the first of which is aligned to all.
__device__ __forceinline__ void red_add(float* target, float a, float b) {
    asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(target), "f"(a), "f"(b) : "memory");
}
__device__ __forceinline__ void red_add(float* target, float a, float b, float c, float d) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(target), "f"(a), "f"(b), "f"(c), "f"(d)
                 : "memory");
}

}  // namespace magi::ptx
