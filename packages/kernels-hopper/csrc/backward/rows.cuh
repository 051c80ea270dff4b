// SPDX-License-Identifier: Apache-2.0
// What is done for each row of queries before the backward kernel.
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

// Block pack + packs * tile: the terms of the tile's rows, and what the backward kernel finds zero. Blocks that run at the
// same time read all heads of the same tokens, which are neighbors in memory.
template <typename T>
__device__ __forceinline__ void prepare(RowParams const& p) {
    using Element = typename T::Element;
    constexpr int kVectors = T::kHeadDimV / 8;                           // of 16 bytes, in a row of outputs
    constexpr int kLanes = kVectors <= 8 ? 8 : kVectors <= 16 ? 16 : 32;  // that share a row
    constexpr int kRowsAtOnce = kRowThreads / kLanes;
    int const num_packs = p.num_heads >> p.log2_pack, tile = blockIdx.x / num_packs, pack = blockIdx.x % num_packs;
    int64_t const number = static_cast<int64_t>(pack) * p.num_tiles_q + tile;
    if (threadIdx.x < T::kDqParts) {
        int64_t const part = number * T::kDqParts + threadIdx.x;
        p.added[part] = p.complete[part] = 0;
    }
    if (blockIdx.x == 0) {
        for (int i = threadIdx.x; i < p.num_items_done; i += kRowThreads) p.items_done[i] = 0;
    }

    bool const no_adders = __ldg(p.adders + tile) == 0;
    float* const terms = p.row_terms + number * 2 * T::kTerms;
    int const lane = threadIdx.x % kLanes;
#pragma unroll
    for (int first = 0; first < T::kTileM; first += kRowsAtOnce) {
        int const row = first + threadIdx.x / kLanes;
        QueryRow const query(p, pack, tile, T::kTileM, row);
        bool const inside = row < T::kTileM && query.token < p.num_q;
        float sum = 0;
        if (inside && lane < kVectors) {
            int64_t const place = query.index * T::kHeadDimV + 8 * lane;
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
        // Rows of tiles that meet no tile of keys, which nobody else writes.
        if (inside && no_adders && p.dq_mode != kAddFloats) {
            int const bytes = T::kHeadDim * (p.dq_mode == kFloats ? 4 : 2);
            auto* const target = reinterpret_cast<uint4*>(static_cast<char*>(p.dq) + query.index * bytes);
            for (int i = lane; i < bytes / 16; i += kLanes) target[i] = make_uint4(0, 0, 0, 0);
        }
        if (lane == 0 && row < T::kTileM) {
            // Rows that see no key, and those beyond the last token, have probabilities exp(-inf).
            float const lse = inside ? p.lse[query.index] : -INFINITY;
            terms[T::term_of(row)] = lse == -INFINITY ? INFINITY : lse * kLog2E;
            terms[T::kTerms + T::term_of(row)] = inside && p.dlse != nullptr ? sum - p.dlse[query.index] : sum;
        }
    }
}

}  // namespace magi::backward
