// SPDX-License-Identifier: Apache-2.0
// Unites the lists of neighboring tokens that share a tile.
#pragma once

#include "params.cuh"

namespace magi::index {

constexpr int kUniteThreads = 256;
constexpr int kKeysOfThread = 16;  // that it looks at, at once

// How many of 16 bytes are not 0.
__device__ __forceinline__ int count_bytes(uint4 const& bytes) {
    uint32_t const one = 0x01010101;
    return __popc(__vcmpne4(bytes.x, 0) & one) + __popc(__vcmpne4(bytes.y, 0) & one) +
           __popc(__vcmpne4(bytes.z, 0) & one) + __popc(__vcmpne4(bytes.w, 0) & one);
}

// The sum of what threads before this one have, and of what all have.
__device__ __forceinline__ int2 sum_before(int value) {
    static __shared__ int totals[kUniteThreads / 32];
    int const lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int sum = value;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        int const other = __shfl_up_sync(~0u, sum, step);
        if (lane >= step) sum += other;
    }
    if (lane == 31) totals[warp] = sum;
    __syncthreads();
    int2 result = make_int2(sum - value, 0);
#pragma unroll
    for (int i = 0; i < kUniteThreads / 32; i++) {
        if (i < warp) result.x += totals[i];
        result.y += totals[i];
    }
    __syncthreads();
    return result;
}

// One warp: marks those of a window's keys that a token's list names.
__device__ __forceinline__ void mark(UniteParams const& p, int const* list, int token, int first, uint32_t* words) {
    constexpr int kAtOnce = 4;
    int const lane = threadIdx.x % 32;
    bool ended = false;
    for (int base = 0; base < p.longest && !ended; base += 32 * kAtOnce) {
        int keys[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; j++) {
            int const i = base + 32 * j + lane;
            keys[j] = i < p.longest ? __ldg(list + i) : -1;
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; j++) {
            uint32_t const negative = __ballot_sync(~0u, keys[j] < 0);
            if (!ended && lane < (negative != 0 ? __ffs(negative) - 1 : 32)) {
                if (keys[j] >= p.num_k) asm volatile("trap;");  // as torch's own indexing does
                int const place = keys[j] - first;
                if (place >= 0 && place < p.window) atomicOr(words + place / 4, 1u << (place % 4 * 8 + token));
            }
            ended |= negative != 0;
        }
    }
}

// Block kv_head + kv heads * tile. A byte of shared memory for each key of a window tells which tokens name it.
__device__ __forceinline__ void unite(UniteParams const& p) {
    extern __shared__ __align__(16) uint32_t words[];
    int const kv_head = blockIdx.x % p.num_kv_heads, token = blockIdx.x / p.num_kv_heads * p.tokens;
    int const warp = threadIdx.x / 32;  // one for each token
    int const* const list = p.indices + (static_cast<int64_t>(token + warp) * p.num_kv_heads + kv_head) * p.longest;
    int* const united = p.united + static_cast<int64_t>(blockIdx.x) * p.united_longest;
    uint8_t* const bits = p.bits + static_cast<int64_t>(blockIdx.x) * p.united_longest;

    int found = 0;
    for (int first = 0; first < p.num_k; first += p.window) {
        for (int i = threadIdx.x; i < p.window / 4; i += kUniteThreads) words[i] = 0;
        __syncthreads();
        if (warp < p.tokens && token + warp < p.num_q) mark(p, list, warp, first, words);
        __syncthreads();
        for (int base = 0; base < min(p.window, p.num_k - first); base += kUniteThreads * kKeysOfThread) {
            int const key = base + threadIdx.x * kKeysOfThread;
            uint4 const bytes = *reinterpret_cast<uint4 const*>(words + key / 4);
            int2 const sum = sum_before(count_bytes(bytes));
            int place = found + sum.x;
            uint32_t const four[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
            for (int i = 0; i < kKeysOfThread; i++) {
                uint32_t const byte = four[i / 4] >> (i % 4 * 8) & 0xFF;
                if (byte != 0) {
                    united[place] = first + key + i;
                    bits[place++] = static_cast<uint8_t>(byte);
                }
            }
            found += sum.y;
        }
        __syncthreads();
    }
    // The rest of the last tile, and the first entry of the next one, which ends the list.
    int const end = min((found + 63) / 64 * 64 + 64, p.united_longest);
    for (int i = found + threadIdx.x; i < end; i += kUniteThreads) {
        united[i] = -1;
        bits[i] = 0;
    }
}

}  // namespace magi::index

extern "C" __global__ void __launch_bounds__(magi::index::kUniteThreads)
    magi_index_unite(__grid_constant__ magi::index::UniteParams const params) {
    magi::index::unite(params);
}
