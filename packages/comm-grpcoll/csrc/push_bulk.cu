// SPDX-License-Identifier: Apache-2.0
// Group cast by bulk copies (the one-dimensional TMA): global memory -> a ring in shared memory -> a peer's memory.
// Two threads of a block work: one loads, one stores. Addresses and sizes must be multiples of 16 bytes.
#include "memory.cuh"

namespace magi {

constexpr uint32_t kStageBytes = 16384;

__device__ __forceinline__ void barrier_init(uint32_t barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier));
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
    uint32_t done = 0;
    while (!done)
        asm volatile(
            "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
}

__device__ __forceinline__ void bulk_load(uint32_t stage, uint64_t from, uint32_t bytes, uint32_t barrier) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(stage),
        "l"(from), "r"(bytes), "r"(barrier)
        : "memory");
}

__device__ __forceinline__ void bulk_store(uint64_t to, uint32_t stage, uint32_t bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(stage), "r"(bytes)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Walks the pieces of this block, stage by stage. A piece is read while the one before is under way.
template <typename Visit>
__device__ __forceinline__ void for_each_stage(const Task* __restrict__ tasks, uint32_t num_tasks, Visit visit) {
    uint32_t number = 0, t = blockIdx.x;
    if (t >= num_tasks) return;
    Task next = tasks[t];
    while (t < num_tasks) {
        const Task task = next;
        t += gridDim.x;
        if (t < num_tasks) next = tasks[t];
        for (uint32_t done = 0; done < task.bytes; done += kStageBytes, ++number)
            visit(number, task, done, min(kStageBytes, task.bytes - done));
    }
}

constexpr int kStages = 14;  // nearly all of a multiprocessor's shared memory
constexpr int kOpen = 7;     // stores that may still be reading their stages; the other stages are being filled

__device__ __forceinline__ void push(const Sources sources, const uint64_t* __restrict__ arenas, uint64_t slot_offset,
                                     const Task* __restrict__ tasks, uint32_t num_tasks) {
    extern __shared__ __align__(128) char ring[];
    __shared__ __align__(8) uint64_t barriers[2 * kStages];
    const uint32_t stages = static_cast<uint32_t>(__cvta_generic_to_shared(ring));
    const uint32_t full = static_cast<uint32_t>(__cvta_generic_to_shared(barriers));
    const uint32_t empty = full + 8 * kStages;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2 * kStages; ++i) barrier_init(full + 8 * i);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for_each_stage(tasks, num_tasks, [&](uint32_t number, const Task& task, uint32_t done, uint32_t bytes) {
            const uint32_t stage = number % kStages, round = number / kStages;
            barrier_wait(empty + 8 * stage, (round & 1) ^ 1);
            bulk_load(stages + stage * kStageBytes, sources[task.tensor] + task.source + done, bytes, full + 8 * stage);
        });
    } else if (threadIdx.x == 32) {
        for_each_stage(tasks, num_tasks, [&](uint32_t number, const Task& task, uint32_t done, uint32_t bytes) {
            const uint32_t stage = number % kStages, round = number / kStages;
            barrier_wait(full + 8 * stage, round & 1);
            bulk_store(arenas[task.peer] + slot_offset + task.target + done, stages + stage * kStageBytes, bytes);
            asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kOpen) : "memory");
            if (number >= kOpen) barrier_arrive(empty + 8 * ((number - kOpen) % kStages));
        });
        // Written, not only read; and before the flags, which go another way.
        asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
        asm volatile("fence.proxy.async;" ::: "memory");
    }
    __syncwarp();
}

}  // namespace magi

extern "C" __global__ void __launch_bounds__(64, 1)
    push_bulk(uint64_t first, uint64_t second, uint64_t third, uint64_t fourth, const uint64_t* arenas,
              uint64_t slot_offset, const magi::Task* tasks, uint32_t num_tasks, const uint64_t* controls,
              uint32_t num_peers, uint64_t flag_offset, uint64_t value, uint32_t* num_done) {
    magi::push({first, second, third, fourth}, arenas, slot_offset, tasks, num_tasks);
    magi::tell_peers(controls, num_peers, flag_offset, value, num_done);
}
