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
    int token, head;
    int64_t index;

    __device__ __forceinline__ QueryRow(RowParams const& p, int pack, int tile, int tile_m, int row) {
        token = tile * (tile_m >> p.log2_pack) + (row >> p.log2_pack);
        head = (pack << p.log2_pack) + (row & ((1 << p.log2_pack) - 1));
        index = static_cast<int64_t>(token) * p.num_heads + head;
    }
};

// Block pack + packs * tile: the terms of the tile's rows, and what the backward kernel finds zero. Blocks that run at the
// same time read all heads of the same tokens, which are neighbors in memory.
template <typename T>
__device__ __forceinline__ void prepare(RowParams const& p) {
    using Element = typename T::Element;
    constexpr int kVectors = T::kHeadDimV / 8;                           // of 16 bytes, in a row of outputs
    constexpr int kLanes = kVectors <= 8 ? 8 : kVectors <= 16 ? 16 : 32;  // that share a row
    constexpr int kRowsAtOnce = kRowThreads / kLanes, kRounds = (T::kTileM + kRowsAtOnce - 1) / kRowsAtOnce;
    int const num_packs = p.num_heads >> p.log2_pack, tile = blockIdx.x / num_packs, pack = blockIdx.x % num_packs;
    int64_t const number = static_cast<int64_t>(pack) * p.num_tiles_q + tile;
    if (threadIdx.x < T::kDqParts && !T::kFine) {
        int64_t const part = number * T::kDqParts + threadIdx.x;
        p.added[part] = p.complete[part] = 0;
    }
    if (blockIdx.x == 0) {
        for (int i = threadIdx.x; i < p.num_items_done; i += kRowThreads) p.items_done[i] = 0;
    }

    bool const no_adders = !T::kFine && __ldg(p.adders + tile) == 0;
    float* const terms = p.row_terms + number * 2 * T::kTerms;
    int const lane = threadIdx.x % kLanes;
    // All loads first: device memory takes as long for many as for one.
    uint4 outs[kRounds], douts[kRounds];
    float lses[kRounds];
#pragma unroll
    for (int i = 0; i < kRounds; i++) {
        int const row = i * kRowsAtOnce + threadIdx.x / kLanes;
        QueryRow const query(p, pack, tile, T::kTileM, row);
        bool const inside = row < T::kTileM && query.token < p.num_q;
        int64_t const place = query.index * kVectors + lane;
        bool const loads = inside && lane < kVectors;
        outs[i] = loads ? __ldg(static_cast<uint4 const*>(p.out) + place) : make_uint4(0, 0, 0, 0);
        douts[i] = loads ? __ldg(static_cast<uint4 const*>(p.dout) + place) : make_uint4(0, 0, 0, 0);
        // Rows that see no key, and those beyond the last token, have probabilities exp(-inf).
        lses[i] = inside ? __ldg(p.lse + query.token * p.lse_token + query.head * p.lse_head) : -INFINITY;
    }
#pragma unroll
    for (int i = 0; i < kRounds; i++) {
        int const row = i * kRowsAtOnce + threadIdx.x / kLanes;
        QueryRow const query(p, pack, tile, T::kTileM, row);
        bool const inside = row < T::kTileM && query.token < p.num_q;
        uint32_t const a[4] = {outs[i].x, outs[i].y, outs[i].z, outs[i].w};
        uint32_t const b[4] = {douts[i].x, douts[i].y, douts[i].z, douts[i].w};
        float sum = 0;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float2 const x = unpack(a[j], Element{}), y = unpack(b[j], Element{});
            sum = fmaf(x.x, y.x, fmaf(x.y, y.y, sum));
        }
#pragma unroll
        for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
        // Rows of tiles that meet no tile of keys, which nobody else writes.
        if (inside && no_adders && p.dq_mode != kAddFloats) {
            int const bytes = T::kHeadDim * (p.dq_mode == kFloats ? 4 : 2);
            auto* const target = reinterpret_cast<uint4*>(static_cast<char*>(p.dq) + query.index * bytes);
            for (int j = lane; j < bytes / 16; j += kLanes) target[j] = make_uint4(0, 0, 0, 0);
        }
        if (lane == 0 && row < T::kTileM) {
            terms[T::term_of(row)] = lses[i] == -INFINITY ? INFINITY : lses[i] * kLog2E;
            terms[T::kTerms + T::term_of(row)] = inside && p.dlse != nullptr ? sum - p.dlse[query.index] : sum;
        }
    }
}

}  // namespace magi::backward
