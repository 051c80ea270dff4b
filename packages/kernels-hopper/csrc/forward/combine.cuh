// SPDX-License-Identifier: Apache-2.0
// Puts the parts together into which the keys of tiles of queries were cut: a warp for each row of the output. Parts come
// in the same order in every run.
#pragma once

#include "../arithmetic.cuh"
#include "params.cuh"

namespace magi::forward {

struct CombineParams {
    Results results;   // as of the forward kernel, but max_logits
    float const* out;  // [parts, num_q, num_heads, head_dim_v], of which a tile has as many as `parts` says
    float const* lse;  // [parts, num_q, num_heads]
    int const* parts;  // of each tile of queries
    int tile_q;        // queries of a tile
};

constexpr int kCombineThreads = 256;

// What a part counts in a sum whose log-sum-exp is `lse`.
__device__ __forceinline__ float weight_of(float part, float lse) { return exp2_approx((part - lse) * kLog2E); }

template <typename Element, int HeadDimV>
__device__ __forceinline__ void combine(CombineParams const& p) {
    constexpr int kPairs = HeadDimV / 64, kRest = HeadDimV % 64 / 2;  // of elements: of a lane, and after the last round
    int const row = blockIdx.x * (kCombineThreads / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    int const num_rows = p.results.num_q * p.results.num_heads;
    if (row >= num_rows) return;
    int const token = row / p.results.num_heads, head = row - token * p.results.num_heads;
    int const parts = p.parts[token / p.tile_q];
    float* const lse = p.results.lse + token * p.results.lse_token + head * p.results.lse_head;
    float const before = p.results.merges ? *lse : -INFINITY;
    float largest = before;
    for (int i = 0; i < parts; i++) largest = fmaxf(largest, p.lse[i * num_rows + row]);
    float const reference = largest == -INFINITY ? 0 : largest;
    float total = weight_of(before, reference);
    for (int i = 0; i < parts; i++) total += weight_of(p.lse[i * num_rows + row], reference);
    // fmaxf passes NaN over, which the sum does not: only where it is 0 nobody sees anything.
    if (total == 0 && p.results.merges) return;
    float const merged = total == 0 ? -INFINITY : reference + kLn2 * __log2f(total);
    float const shared = total == 0 ? 0 : merged;

    int64_t const offset = static_cast<int64_t>(row) * HeadDimV;
    auto* const floats = static_cast<float*>(p.results.out) + offset;
    auto* const elements = static_cast<Element*>(p.results.out) + offset;
#pragma unroll
    for (int round = 0; round < kPairs + (kRest > 0); round++) {
        int const column = round * 64 + lane * 2;
        if (column >= HeadDimV) break;
        float2 sum = make_float2(0, 0);
        if (before != -INFINITY) {
            float2 const old = p.results.out_is_float ? *reinterpret_cast<float2*>(floats + column)
                                                      : unpack(*reinterpret_cast<uint32_t*>(elements + column), Element{});
            float const weight = weight_of(before, shared);
            sum = make_float2(old.x * weight, old.y * weight);
        }
        for (int i = 0; i < parts; i++) {
            float const weight = weight_of(p.lse[i * num_rows + row], shared);
            if (weight == 0) continue;  // of a part that nobody sees nothing but zeros is known
            float2 const part = *reinterpret_cast<float2 const*>(p.out + i * num_rows * static_cast<int64_t>(HeadDimV) +
                                                                 offset + column);
            sum = make_float2(fmaf(part.x, weight, sum.x), fmaf(part.y, weight, sum.y));
        }
        if (p.results.out_is_float) {
            *reinterpret_cast<float2*>(floats + column) = sum;
        } else {
            *reinterpret_cast<uint32_t*>(elements + column) = pack(sum.x, sum.y, Element{});
        }
    }
    __syncwarp();  // all have read the one before
    if (lane == 0) *lse = merged;
}

}  // namespace magi::forward
