// SPDX-License-Identifier: Apache-2.0
// Loads and stores of the group collectives: streaming copies, and flags that other GPUs read.
#pragma once
#include <stdint.h>

namespace magi {

// One contiguous piece that a rank sends. The host makes the table: magi_comm_grpcoll.tables.TASK.
struct Task {
    uint64_t source;  // byte in the source tensor
    uint64_t target;  // byte in the peer's slot
    uint32_t bytes;
    uint16_t tensor;  // which source tensor
    uint16_t peer;    // which rank
};
static_assert(sizeof(Task) == 24);

// Addresses come one by one: the launcher passes no structs by value.
struct Sources {
    uint64_t first, second, third, fourth;
    __device__ __forceinline__ uint64_t operator[](uint32_t tensor) const {
        return tensor == 0 ? first : tensor == 1 ? second : tensor == 2 ? third : fourth;
    }
};

__device__ __forceinline__ void store_release(uint64_t address, uint64_t value) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

// Called by all threads of a block once its pieces are stored. The last block of the grid tells every peer.
// `num_done` counts blocks and is zero again afterwards.
__device__ __forceinline__ void tell_peers(const uint64_t* __restrict__ controls, uint32_t num_peers,
                                           uint64_t flag_offset, uint64_t value, uint32_t* __restrict__ num_done) {
    __shared__ bool is_last;
    __threadfence_system();
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomicAdd(num_done, 1u) == gridDim.x - 1;
    __syncthreads();
    if (!is_last) return;
    __threadfence_system();
    for (uint32_t peer = threadIdx.x; peer < num_peers; peer += blockDim.x)
        store_release(controls[peer] + flag_offset, value);
    if (threadIdx.x == 0) *num_done = 0;
}

}  // namespace magi
