// SPDX-License-Identifier: Apache-2.0
// What is done for each row of queries before the backward kernel of index attention, and for each row of keys after it.
#pragma once

#include "../arithmetic.cuh"
#include "../ptx/global.cuh"
#include "backward_traits.cuh"

namespace magi::index {

constexpr int kRowThreads = 256;

// Terms of rows of queries, a group of lanes each.
template <typename T>
__device__ __forceinline__ void prepare(TermsParams const& p) {
    using Element = typename T::Element;
    constexpr int kVectors = T::kHeadDimV / 8;                           // of 16 bytes, in a row of outputs
    constexpr int kLanes = kVectors <= 8 ? 8 : kVectors <= 16 ? 16 : 32;  // that share a row
    int64_t const row = (static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x) / kLanes;
    int const lane = threadIdx.x % kLanes;
    bool const inside = row < p.num_rows;
    float sum = 0;
    if (inside && lane < kVectors) {
        int64_t const vector = row * kVectors + lane;
        uint4 const a = static_cast<uint4 const*>(p.out)[vector], b = static_cast<uint4 const*>(p.dout)[vector];
        uint32_t const of_a[4] = {a.x, a.y, a.z, a.w}, of_b[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float2 const x = unpack(of_a[i], Element{}), y = unpack(of_b[i], Element{});
            sum = fmaf(x.x, y.x, fmaf(x.y, y.y, sum));
        }
    }
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (inside && lane == 0) {
        float const lse = p.lse[row];
        p.lse_terms[row] = lse == -INFINITY ? INFINITY : lse * kLog2E;
        p.delta[row] = p.dlse != nullptr ? sum - p.dlse[row] : sum;
    }
}

// Adds up the gradients of one row of keys, or of values, that its entries have: each of the block's groups of threads
// adds every so many of them, and their sums are added in order.
template <int Dim>
__device__ __forceinline__ void sum_entries(float const* entries, int64_t first, int64_t end, float* target) {
    constexpr int kVectors = Dim / 4, kGroups = kRowThreads / kVectors;
    static __shared__ float4 sums[kGroups][kVectors];
    int const group = threadIdx.x / kVectors, vector = threadIdx.x % kVectors;
    auto const* const from = reinterpret_cast<float4 const*>(entries) + vector;
    float4 sum = make_float4(0, 0, 0, 0);
    if (group < kGroups) {
#pragma unroll 4
        for (int64_t entry = first + group; entry < end; entry += kGroups) {
            float4 const x = ptx::load_once(from + entry * kVectors);
            sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
        }
        sums[group][vector] = sum;
    }
    __syncthreads();
    if (threadIdx.x < kVectors) {
        auto* const to = reinterpret_cast<float4*>(target) + threadIdx.x;
        sum = *to;
#pragma unroll
        for (int i = 0; i < kGroups; i++) {
            float4 const x = sums[i][threadIdx.x];
            sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
        }
        *to = sum;
    }
}

template <typename T>
__device__ __forceinline__ void sum_rows(SumParams const& p) {
    int64_t const row = blockIdx.x;
    int64_t const first = p.first[row] * p.packs, end = p.first[row + 1] * p.packs;
    if (first == end) return;
    sum_entries<T::kHeadDim>(p.dk, first, end, p.dk_sums + row * T::kHeadDim);
    __syncthreads();
    sum_entries<T::kHeadDimV>(p.dv, first, end, p.dv_sums + row * T::kHeadDimV);
}

// 16 columns of a row of sums to elements.
template <typename Element>
__device__ __forceinline__ void convert(float const* sums, void* target, int64_t number, float scale) {
    float values[16];
#pragma unroll
    for (int i = 0; i < 16; i += 4) {
        float4 const x = *reinterpret_cast<float4 const*>(sums + number * 16 + i);
        values[column_of(i)] = x.x * scale, values[column_of(i + 1)] = x.y * scale;
        values[column_of(i + 2)] = x.z * scale, values[column_of(i + 3)] = x.w * scale;
    }
    uint32_t words[8];
#pragma unroll
    for (int i = 0; i < 8; i++) words[i] = pack(values[2 * i], values[2 * i + 1], Element{});
    auto* const to = reinterpret_cast<uint4*>(static_cast<Element*>(target) + number * 16);
    to[0] = make_uint4(words[0], words[1], words[2], words[3]);
    to[1] = make_uint4(words[4], words[5], words[6], words[7]);
}

template <typename T>
__device__ __forceinline__ void finish(FinishParams const& p) {
    int64_t const of_keys = static_cast<int64_t>(p.num_rows) * (T::kHeadDim / 16);
    int64_t const of_values = static_cast<int64_t>(p.num_rows) * (T::kHeadDimV / 16);
    int64_t const number = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
    if (number < of_keys) {
        convert<typename T::Element>(p.dk_sums, p.dk, number, p.dk_scale);
    } else if (number < of_keys + of_values) {
        convert<typename T::Element>(p.dv_sums, p.dv, number - of_keys, 1);
    }
}

}  // namespace magi::index
