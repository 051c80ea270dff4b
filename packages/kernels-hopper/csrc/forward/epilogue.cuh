// SPDX-License-Identifier: Apache-2.0
// From accumulators to the output tensors.
#pragma once

#include "softmax.cuh"

namespace magi::forward {

// Where one of a thread's two rows goes.
struct OutputRow {
    int64_t index;  // token * heads + head
    bool inside;    // the token exists
};

template <typename T>
__device__ __forceinline__ void store_elements(Params const& p, float const (&o)[T::kHeadDimV / 2], int r,
                                               OutputRow row) {
    using Element = typename T::Element;
    int const lane = threadIdx.x % 4;
    auto* target = static_cast<Element*>(p.out) + row.index * T::kHeadDimV;
#pragma unroll
    for (int column = 0; column < T::kHeadDimV; column += 32) {
        uint32_t words[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int const i = column / 2 + 4 * j + 2 * r;
            words[j] = pack(o[i], o[i + 1], Element{});
        }
        transpose_quad(words);
        if (row.inside) {
            *reinterpret_cast<uint4*>(target + column + 8 * lane) = make_uint4(words[0], words[1], words[2], words[3]);
        }
    }
}

// Adds `weight` times what is there already.
template <typename T>
__device__ __forceinline__ void store_floats(Params const& p, float const (&o)[T::kHeadDimV / 2], int r, OutputRow row,
                                             float weight) {
    if (!row.inside) return;
    float* target = static_cast<float*>(p.out) + row.index * T::kHeadDimV + threadIdx.x % 4 * 2;
#pragma unroll
    for (int column = 0; column < T::kHeadDimV; column += 8) {
        int const i = column / 2 + 2 * r;
        float2 value = make_float2(o[i], o[i + 1]);
        float2* const place = reinterpret_cast<float2*>(target + column);
        if (weight != 0) {
            float2 const before = *place;
            value.x = fmaf(before.x, weight, value.x);
            value.y = fmaf(before.y, weight, value.y);
        }
        *place = value;
    }
}

// Writes one of a thread's two rows, whose accumulators are not yet divided by the row's sum.
template <typename T, int R>
__device__ __forceinline__ void store_row(Params const& p, Softmax<T> const& softmax, float (&o)[T::kHeadDimV / 2],
                                          OutputRow row) {
    float factor, weight_before = 0;
    float lse = softmax.finish(R, factor);
    if (p.merges && row.inside) {
        float const before = p.lse[row.index];
        if (lse == -INFINITY) {
            row.inside = false;  // what is there stays
        } else {
            float const both = fmaxf(before, lse);
            float const merged =
                both +
                kLn2 * __log2f(exp2_approx((before - both) * kLog2E) + exp2_approx((lse - both) * kLog2E));
            weight_before = exp2_approx((before - merged) * kLog2E);
            factor *= exp2_approx((lse - merged) * kLog2E);
            lse = merged;
        }
    }
    __syncwarp();  // the four threads of a row have read its lse, of which one now writes the new one
#pragma unroll
    for (int i = 2 * R; i < T::kHeadDimV / 2; i += 4) {
        o[i] *= factor;
        o[i + 1] *= factor;
    }
    if (p.out_is_float) {
        store_floats<T>(p, o, R, row, weight_before);
    } else {
        store_elements<T>(p, o, R, row);
    }
    if (row.inside && threadIdx.x % 4 == 0) p.lse[row.index] = lse;
}

// The largest in memory, of floats of either sign; NaN never comes here.
__device__ __forceinline__ void atomic_max(float* target, float value) {
    if (value >= 0) {
        atomicMax(reinterpret_cast<int*>(target), __float_as_int(value + 0.0f));  // -0 becomes 0
    } else {
        atomicMin(reinterpret_cast<unsigned*>(target), __float_as_uint(value));
    }
}

template <typename T>
__device__ __forceinline__ void store_max_logits(Params const& p, Softmax<T> const& softmax, OutputRow const (&rows)[2]) {
    if (threadIdx.x % 4 != 0) return;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        if (rows[r].inside && softmax.largest[r] != -INFINITY) {
            atomic_max(p.max_logits + rows[r].index % p.num_heads, softmax.largest[r] * p.scale);
        }
    }
}

}  // namespace magi::forward
