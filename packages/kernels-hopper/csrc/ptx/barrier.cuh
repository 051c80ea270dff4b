// SPDX-License-Identifier: Apache-2.0
// Named barriers between warps, and the exchange of registers between warpgroups.
#pragma once

#include <cstdint>

namespace magi::ptx {

// Waits until `threads` threads, these included, have come to barrier `id`; 0 is that of __syncthreads().
__device__ __forceinline__ void barrier_sync(uint32_t id, uint32_t threads) {
    asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Comes to barrier `id` without waiting.
__device__ __forceinline__ void barrier_arrive(uint32_t id, uint32_t threads) {
    asm volatile("barrier.cta.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

template <uint32_t Registers>
__device__ __forceinline__ void setmaxnreg_inc() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

template <uint32_t Registers>
__device__ __forceinline__ void setmaxnreg_dec() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

// True in one thread of a warp whose threads all come here.
__device__ __forceinline__ bool elect_sync() {
    uint32_t chosen;
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "elect.sync _|p, 0xffffffff;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(chosen));
    return chosen != 0;
}

}  // namespace magi::ptx
