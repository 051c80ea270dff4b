// SPDX-License-Identifier: Apache-2.0
// The online softmax of the two rows of scores that a thread has a part of (Milakov and Gimelshein, 2018).
#pragma once

#include "../arithmetic.cuh"
#include "mask.cuh"

namespace magi::forward {

// The largest of a row, and its sum, over the four threads that share it.
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

template <typename T>
struct Softmax {
    // Of the scores before scale and cap: at most `tolerance` below the largest of a row.
    float largest[2] = {-INFINITY, -INFINITY};
    float sum[2] = {0, 0};  // of exp(score - largest), over this thread's columns
    Scoring const& p;

    __device__ __forceinline__ explicit Softmax(Scoring const& p) : p(p) {}

    // A product of query and key to what the softmax is taken of, up to to_log2: cap * tanh(scale * x / cap), or itself.
    __device__ __forceinline__ float capped(float x) const {
        if constexpr (!T::kSoftcap) return x;
        return p.softcap - 2 * p.softcap * reciprocal_approx(exp2_approx(x * p.cap_slope) + 1);
    }

    // The exponent of 2 of a score, relative to the largest of its row. With softcap, two additions fewer than by capped.
    template <bool Masked>
    __device__ __forceinline__ float exponent(float x, float minus_largest) const {
        if constexpr (!T::kSoftcap) return fmaf(x, p.to_log2, minus_largest);
        float const cap = p.softcap * p.to_log2;
        float const y = fmaf(reciprocal_approx(exp2_approx(x * p.cap_slope) + 1), -2 * cap, cap + minus_largest);
        return Masked && x == -INFINITY ? x : y;
    }

    // Takes in the scores of a tile, which become probabilities relative to the largest score so far, or to one before
    // that is at most `tolerance` lower. What was summed up before must be multiplied by `shrink`, which is done here for
    // the sums.
    template <bool Masked, int Count>
    __device__ __forceinline__ void step(float (&scores)[Count], uint32_t const (&bits)[2][2],
                                         float (&shrink)[2], float tolerance = 0) {
        if constexpr (Masked) apply_mask<T::kBoxN>(scores, bits);
        float minus_largest[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float tile = fmaxf(scores[2 * r], scores[2 * r + 1]);
#pragma unroll
            for (int i = 4; i < Count; i += 4) {
                tile = fmaxf(tile, fmaxf(scores[i + 2 * r], scores[i + 2 * r + 1]));
            }
            tile = quad_max(tile);
            float const before = largest[r];
            bool const grows = T::kShrinksRarely ? tile > before + tolerance : true;
            largest[r] = T::kShrinksRarely ? (grows ? tile : before) : fmaxf(before, tile);
            // Rows that have seen nothing yet keep -inf, of which no difference may be taken.
            float const reference = Masked && largest[r] == -INFINITY ? 0 : capped(largest[r]);
            minus_largest[r] = -reference * p.to_log2;
            float const factor =
                exp2_approx((before == -INFINITY ? before : capped(before)) * p.to_log2 + minus_largest[r]);
            shrink[r] = grows ? factor : 1;
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float total[2] = {0, 0};
#pragma unroll
            for (int i = 2 * r; i < Count; i += 4) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    scores[i + e] = exp2_approx(exponent<Masked>(scores[i + e], minus_largest[r]));
                    total[e] += scores[i + e];
                }
            }
            sum[r] = fmaf(sum[r], shrink[r], total[0] + total[1]);
        }
    }

    // The row's natural log-sum-exp, and the factor that makes what was summed up an average.
    __device__ __forceinline__ float finish(int r, float& factor) const {
        float const total = quad_sum(sum[r]);
        factor = total == 0 ? 0 : reciprocal_approx(total);  // NaN stays NaN, in the log-sum-exp too
        float const exponent = largest[r] == -INFINITY ? 0 : capped(largest[r]) * p.to_log2;
        return total == 0 ? -INFINITY : (exponent + __log2f(total)) * kLn2;
    }
};

}  // namespace magi::forward
