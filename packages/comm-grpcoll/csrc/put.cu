// SPDX-License-Identifier: Apache-2.0
// Group cast between nodes by NVSHMEM: puts that raise the receiver's flag, over the network by IBGDA, or over NVLink
// where a peer can be reached so. Linked with libnvshmem_device when the wheel is built.
//
// A flag is a word of the receiver for each sender. An exchange adds exactly kUnit to it: one for each piece that has
// arrived, and the rest at once. So it reaches a multiple of kUnit when all pieces are there, in whatever order.
#include <nvshmem.h>
#include <nvshmemx.h>

#include "memory.cuh"

namespace magi {

constexpr uint64_t kUnit = 1ull << 28;  // See magi_comm_grpcoll.puts.UNIT

__device__ __forceinline__ uint64_t* word(uint64_t address) { return reinterpret_cast<uint64_t*>(address); }

}  // namespace magi

// The pieces lie in this rank's own symmetric memory, at `stage`: a network adapter reads no other. `flag` is this rank's
// word in everybody's control block, and `num_pieces[p]` how many pieces go to rank p.
extern "C" __global__ void __launch_bounds__(512, 1)
    put_signal(uint64_t stage, uint64_t slot, const magi::Task* __restrict__ tasks, uint32_t num_tasks,
               const uint32_t* __restrict__ num_pieces, uint32_t num_peers, uint32_t me, uint64_t flag, uint64_t value,
               uint32_t* __restrict__ num_done) {
    for (uint32_t t = blockIdx.x; t < num_tasks; t += gridDim.x) {
        const magi::Task task = tasks[t];
        nvshmemx_putmem_signal_nbi_block(reinterpret_cast<void*>(slot + task.target),
                                         reinterpret_cast<const void*>(stage + task.source), task.bytes,
                                         magi::word(flag), 1, NVSHMEM_SIGNAL_ADD, task.peer);
    }
    for (uint32_t peer = blockIdx.x * blockDim.x + threadIdx.x; peer < num_peers; peer += gridDim.x * blockDim.x)
        if (peer != me)
            nvshmemx_signal_op(magi::word(flag), magi::kUnit - num_pieces[peer], NVSHMEM_SIGNAL_ADD, peer);
    // This rank's own word says that its tensors have been read: after all that any block has under way.
    __shared__ bool is_last;
    __syncthreads();
    if (threadIdx.x == 0) {
        nvshmem_quiet();
        __threadfence_system();
        is_last = atomicAdd(num_done, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (!is_last || threadIdx.x != 0) return;
    __threadfence_system();
    *num_done = 0;
    magi::store_release(flag, value);
}

// Sets this rank's word in everybody's control block, in the order of the calls.
extern "C" __global__ void __launch_bounds__(128, 1) tell_all(uint64_t flag, uint64_t value, uint32_t num_peers,
                                                            uint32_t me) {
    for (uint32_t peer = threadIdx.x; peer < num_peers; peer += blockDim.x) {
        if (peer == me)
            magi::store_release(flag, value);
        else
            nvshmemx_signal_op(magi::word(flag), value, NVSHMEM_SIGNAL_SET, peer);
    }
    nvshmem_quiet();
}

// The words have reached the value already. What was put before them may be read afterwards, also if it came from a NIC.
extern "C" __global__ void __launch_bounds__(128, 1)
    see_arrived(const uint64_t* __restrict__ words, uint32_t num_words, uint64_t value) {
    for (uint32_t i = threadIdx.x; i < num_words; i += blockDim.x)
        nvshmem_signal_wait_until(magi::word(words[i]), NVSHMEM_CMP_GE, value);
}
