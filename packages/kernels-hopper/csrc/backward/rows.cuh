// SPDX-License-Identifier: Apache-2.0
// What is done for each row of queries before and after the backward kernel.
#pragma once

#include "../arithmetic.cuh"
#include "params.cuh"
#include "traits.cuh"

namespace magi::backward {

constexpr int kRowThreads = 256;

// The row of queries that is row `row` of a tile: which token, and which row of [num_q, heads].
struct QueryRow {
    int token;
    int64_t index;

    __device__ __forceinline__ QueryRow(RowParams const& p, int pack, int tile, int tile_m, int row) {
        token = tile * (tile_m >> p.log2_pack) + (row >> p.log2_pack);
        index = static_cast<int64_t>(token) * p.num_heads + (pack << p.log2_pack) + (row & ((1 << p.log2_pack) - 1));
    }
};

// Block tile + num_tiles_q * pack: the terms of the tile's rows, and zeros for their sums of gradients.
template <typename T>
__device__ __forceinline__ void prepare(RowParams const& p) {
    using Element = typename T::Element;
    constexpr int kVectors = T::kHeadDim / 8;                            // of 16 bytes, in a row
    constexpr int kLanes = kVectors <= 8 ? 8 : kVectors <= 16 ? 16 : 32;  // that share a row
    constexpr int kRowsAtOnce = kRowThreads / kLanes;
    int const tile = blockIdx.x % p.num_tiles_q, pack = blockIdx.x / p.num_tiles_q;
    int64_t const number = static_cast<int64_t>(pack) * p.num_tiles_q + tile;
    auto* const sums = reinterpret_cast<float4*>(p.dq_sums + number * T::kTileM * T::kHeadDim);
    for (int i = threadIdx.x; i < T::kTileM * T::kHeadDim / 4; i += kRowThreads) sums[i] = make_float4(0, 0, 0, 0);
    if (p.semaphores != nullptr && threadIdx.x < T::kDqParts) p.semaphores[number * T::kDqParts + threadIdx.x] = 0;

    float* const terms = p.row_terms + number * 2 * T::kTerms;
    int const lane = threadIdx.x % kLanes;
#pragma unroll
    for (int first = 0; first < T::kTileM; first += kRowsAtOnce) {
        int const row = first + threadIdx.x / kLanes;
        QueryRow const query(p, pack, tile, T::kTileM, row);
        bool const inside = row < T::kTileM && query.token < p.num_q;
        float sum = 0;
        if (inside && lane < kVectors) {
            int64_t const place = query.index * T::kHeadDim + 8 * lane;
            uint4 const a = *reinterpret_cast<uint4 const*>(static_cast<Element const*>(p.out) + place);
            uint4 const b = *reinterpret_cast<uint4 const*>(static_cast<Element const*>(p.dout) + place);
            uint32_t const of_a[4] = {a.x, a.y, a.z, a.w}, of_b[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float2 const x = unpack(of_a[i], Element{}), y = unpack(of_b[i], Element{});
                sum = fmaf(x.x, y.x, fmaf(x.y, y.y, sum));
            }
        }
#pragma unroll
        for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
        if (lane == 0 && row < T::kTileM) {
            // Rows that see no key, and those beyond the last token, have probabilities exp(-inf).
            float const lse = inside ? p.lse[query.index] : -INFINITY;
            terms[T::term_of(row)] = lse == -INFINITY ? INFINITY : lse * kLog2E;
            terms[T::kTerms + T::term_of(row)] = inside && p.dlse != nullptr ? sum - p.dlse[query.index] : sum;
        }
    }
}

// Block parts * (tile + num_tiles_q * pack) + part: from what has been added up, in the order of accumulators, to gradients
// of the tile's rows, of which a part is a block of columns.
template <typename T>
__device__ __forceinline__ void convert(RowParams const& p) {
    constexpr int kStride = T::kDqColumns + 4, kVectors = T::kDqColumns / 8;
    __shared__ float rows[T::kTileM * kStride];
    int const part = blockIdx.x % T::kDqParts, number = blockIdx.x / T::kDqParts;
    int const first_column = T::kDqColumns * part;
    auto const* const sums = reinterpret_cast<float4 const*>(p.dq_sums + static_cast<int64_t>(blockIdx.x) * T::kDqFloats);
#pragma unroll
    for (int first = 0; first < T::kDqFloats / 4; first += kRowThreads) {
        int const i = first + threadIdx.x;
        float4 const sum = sums[i];
        float const value[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
        for (int e = 0; e < 4; e++) {
            DqPlace const place = T::dq_place(part, i % 128, i / 128 * 4 + e);
            rows[place.row * kStride + place.column - first_column] = value[e] * p.scale;
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < T::kTileM * kVectors; i += kRowThreads) {
        QueryRow const query(p, number / p.num_tiles_q, number % p.num_tiles_q, T::kTileM, i / kVectors);
        if (query.token >= p.num_q) continue;
        float const* const from = rows + i / kVectors * kStride + i % kVectors * 8;
        int64_t const to = query.index * T::kHeadDim + first_column + i % kVectors * 8;
        float4 const a = *reinterpret_cast<float4 const*>(from), b = *reinterpret_cast<float4 const*>(from + 4);
        if (p.dq_is_float) {
            auto* const target = reinterpret_cast<float4*>(static_cast<float*>(p.dq) + to);
            target[0] = a;
            target[1] = b;
        } else {
            using Element = typename T::Element;
            *reinterpret_cast<uint4*>(static_cast<Element*>(p.dq) + to) =
                make_uint4(magi::pack(a.x, a.y, Element{}), magi::pack(a.z, a.w, Element{}),
                           magi::pack(b.x, b.y, Element{}), magi::pack(b.z, b.w, Element{}));
        }
    }
}

}  // namespace magi::backward
