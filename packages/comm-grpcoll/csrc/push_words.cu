// SPDX-License-Identifier: Apache-2.0
// Group cast by plain loads and stores of 1 to 16 bytes, for rows that bulk copies can't take.
#include "memory.cuh"

namespace magi {

constexpr int kUnroll = 4;

template <typename Word>
__device__ __forceinline__ void copy_words(uint64_t to, uint64_t from, uint32_t num_words) {
    const Word* __restrict__ source = reinterpret_cast<const Word*>(from);
    Word* __restrict__ target = reinterpret_cast<Word*>(to);
    uint32_t i = threadIdx.x;
    for (; i + (kUnroll - 1) * blockDim.x < num_words; i += kUnroll * blockDim.x) {
        Word words[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) words[u] = source[i + u * blockDim.x];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) target[i + u * blockDim.x] = words[u];
    }
    for (; i < num_words; i += blockDim.x) target[i] = source[i];
}

template <typename Word>
__device__ __forceinline__ void push(const Sources sources, const uint64_t* __restrict__ arenas, uint64_t slot_offset,
                                     const Task* __restrict__ tasks, uint32_t num_tasks) {
    for (uint32_t t = blockIdx.x; t < num_tasks; t += gridDim.x) {
        const Task task = tasks[t];
        copy_words<Word>(arenas[task.peer] + slot_offset + task.target, sources[task.tensor] + task.source,
                         task.bytes / sizeof(Word));
    }
}

}  // namespace magi

#define MAGI_PUSH_WORDS(BYTES, WORD)                                                                                  \
    extern "C" __global__ void __launch_bounds__(512, 1) push_words_##BYTES(                                          \
        uint64_t first, uint64_t second, uint64_t third, uint64_t fourth, const uint64_t* arenas,                     \
        uint64_t slot_offset, const magi::Task* tasks, uint32_t num_tasks, const uint64_t* controls,                  \
        uint32_t num_peers, uint64_t flag_offset, uint64_t value, uint32_t* num_done) {                               \
        magi::push<WORD>({first, second, third, fourth}, arenas, slot_offset, tasks, num_tasks);                      \
        magi::tell_peers(controls, num_peers, flag_offset, value, num_done);                                          \
    }

MAGI_PUSH_WORDS(16, uint4)
MAGI_PUSH_WORDS(8, uint2)
MAGI_PUSH_WORDS(4, uint32_t)
MAGI_PUSH_WORDS(2, uint16_t)
MAGI_PUSH_WORDS(1, uint8_t)
