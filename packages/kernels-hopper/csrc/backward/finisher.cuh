// SPDX-License-Identifier: Apache-2.0
// A warp of each block turns sums of gradients of queries to gradients once all tiles of keys have added, while the sums
// are in the L2 cache. From there they are dropped: as a rule they never reach device memory. Consumers help when there are
// no items left: where few tiles of keys meet a tile of queries, one warp does not keep up.
#pragma once

#include "../arithmetic.cuh"
#include "../ptx/global.cuh"
#include "../ptx/movmatrix.cuh"
#include "params.cuh"
#include "traits.cuh"

namespace magi::backward {

template <typename T>
struct Finisher {
    static constexpr int kVectors = T::kDqFloats / 4;  // of a part
    Params const& p;
    int const lane = threadIdx.x % 32;

    // Lets some block's warp know that a part is complete.
    static __device__ __forceinline__ void push(Params const& p, int part) {
        ptx::store_release(p.complete + atomicAdd(p.counters + 3, 1), part + 1);
    }

    // Gradients of the rows of a part, which is a block of columns, from sums in the order of accumulators.
    template <int Groups>
    __device__ __forceinline__ void convert(int number) const {
        int const part = number % T::kDqParts, tile = number / T::kDqParts, pack = tile / p.num_tiles_q;
        int const first_token = tile % p.num_tiles_q * (T::kTileM >> p.log2_pack);
        auto const* sums = reinterpret_cast<float4 const*>(p.dq_sums) + static_cast<int64_t>(number) * kVectors + lane;
        if constexpr (T::kTall) {
            convert_swapped<Groups>(sums, part, pack, first_token);
            return;
        }
#pragma unroll 1
        for (int thread = lane; thread < 128; thread += 32, sums += 32) {
            int const row = accumulator_row(thread, 0);
            int const low = row_index(pack, first_token, row), high = row_index(pack, first_token, row + 8);
#pragma unroll
            for (int first = 0; first < kVectors / 128; first += 4) {  // 32 columns
                int const of_first = T::dq_place(0, 0, 4 * first).column;
                int const of_last = T::dq_place(T::kDqParts - 1, 0, 4 * first).column;
                int const column = of_first + part * (of_last - of_first);
                if (p.dq_mode == kElements) {
                    store_elements(sums + first * 128, low, high, column);
                } else {
                    store_floats(sums + first * 128, low, high, column);
                }
            }
        }
    }

    // The same where the part's sums are those of columns by rows, `Groups` of 8 rows at a time.
    template <int Groups>
    __device__ __forceinline__ void convert_swapped(float4 const* sums, int part, int pack, int first_token) const {
        if (p.dq_mode != kElements) {
#pragma unroll 1
            for (int i = 0; i < kVectors / 64; i++) {
                store_swapped_floats(sums + 64 * i, pack, first_token, i / 2 * 8, 64 * part + i % 2 * 32);
            }
            return;
        }
        using Element = typename T::Element;
        static_assert(T::kTileM / 8 % Groups == 0);
#pragma unroll 1
        for (int first = 0; first < T::kTileM / 8; first += Groups) {
            float4 block[4 * Groups];  // of 8 rows and 16 columns
#pragma unroll
            for (int i = 0; i < 4 * Groups; i++) block[i] = ptx::load_once(sums + 128 * first + 32 * i);
#pragma unroll
            for (int group = 0; group < Groups; group++) {
                uint2 words[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float4 const x = block[4 * group + i];
                    words[i].x = ptx::movmatrix_trans(magi::pack(x.x * p.dq_scale, x.y * p.dq_scale, Element{}));
                    words[i].y = ptx::movmatrix_trans(magi::pack(x.z * p.dq_scale, x.w * p.dq_scale, Element{}));
                    exchange(words[i].x, words[i].y, 1);
                }
                int const row = row_index(pack, first_token, (first + group) * 8 + lane / 4);
                if (row < 0) continue;
                auto* const of_row = static_cast<Element*>(p.dq) + static_cast<int64_t>(row) * T::kHeadDim + 64 * part;
                auto* const target = reinterpret_cast<uint2*>(of_row) + lane % 2 * 2 + lane % 4 / 2;
#pragma unroll
                for (int i = 0; i < 4; i++) target[4 * i] = words[i];
            }
        }
    }

    __device__ __forceinline__ void store_swapped_floats(float4 const* sums, int pack, int first_token, int first_row,
                                                         int column) const {
#pragma unroll 1
        for (int e = 0; e < 8; e++) {  // the accumulators of two columns of 16
            int const row = row_index(pack, first_token, first_row + lane % 4 * 2 + e % 2);
            if (row < 0) continue;
            float const sum = reinterpret_cast<float const*>(sums + e / 4 * 32)[e % 4];
            float* const of_row = static_cast<float*>(p.dq) + static_cast<int64_t>(row) * T::kHeadDim;
            float* const target = of_row + column + lane / 4 + e / 2 * 8;
            *target = sum * p.dq_scale + (p.dq_mode == kAddFloats ? *target : 0);
        }
    }

    // 32 columns from `column` on of two rows.
    __device__ __forceinline__ void store_elements(float4 const* sums, int low, int high, int column) const {
        using Element = typename T::Element;
        uint32_t words[2][4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float4 const sum = ptx::load_once(sums + j * 128);
            words[0][j] = magi::pack(sum.x * p.dq_scale, sum.y * p.dq_scale, Element{});
            words[1][j] = magi::pack(sum.z * p.dq_scale, sum.w * p.dq_scale, Element{});
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            transpose_quad(words[r]);
            int const row = r == 0 ? low : high;
            if (row < 0) continue;
            auto* const target = static_cast<Element*>(p.dq) + static_cast<int64_t>(row) * T::kHeadDim + column;
            reinterpret_cast<uint4*>(target)[lane % 4] = make_uint4(words[r][0], words[r][1], words[r][2], words[r][3]);
        }
    }

    __device__ __forceinline__ void store_floats(float4 const* sums, int low, int high, int column) const {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float4 const sum = ptx::load_once(sums + j * 128);
#pragma unroll
            for (int r = 0; r < 2; r++) {
                int const row = r == 0 ? low : high;
                if (row < 0) continue;
                float* const group = static_cast<float*>(p.dq) + static_cast<int64_t>(row) * T::kHeadDim + column + 8 * j;
                auto* const target = reinterpret_cast<float2*>(group) + lane % 4;
                float2 pair = r == 0 ? make_float2(sum.x, sum.y) : make_float2(sum.z, sum.w);
                pair = make_float2(pair.x * p.dq_scale, pair.y * p.dq_scale);
                if (p.dq_mode == kAddFloats) pair = make_float2(pair.x + target->x, pair.y + target->y);
                *target = pair;
            }
        }
    }

    // Which of the rows of [num_q, heads, head_dim] a tile's row is, or -1 beyond the last token.
    __device__ __forceinline__ int row_index(int pack, int first_token, int row) const {
        int const token = first_token + (row >> p.log2_pack);
        int const head = (pack << p.log2_pack) + (row & ((1 << p.log2_pack) - 1));
        return token < p.num_q ? token * (p.num_packs << p.log2_pack) + head : -1;
    }

    // What is in the cache of a part is never needed again.
    __device__ __forceinline__ void drop(int number) const {
        constexpr int kLineFloats = 32;
        static_assert(T::kDqFloats % kLineFloats == 0);
        float const* const sums = p.dq_sums + static_cast<int64_t>(number) * T::kDqFloats;
        __syncwarp();
        for (int i = lane * kLineFloats; i < T::kDqFloats; i += 32 * kLineFloats) ptx::discard_l2(sums + i);
    }

    template <int Groups>
    __device__ __forceinline__ void run() const {
        while (true) {
            int number = -1;
            if (lane == 0) {
                int const place = atomicAdd(p.counters + 2, 1);
                if (place < p.num_complete) number = ptx::wait_until_set(p.complete + place) - 1;
            }
            number = __shfl_sync(~0u, number, 0);
            if (number < 0) break;
            convert<Groups>(number);
            drop(number);
        }
    }
};

}  // namespace magi::backward
