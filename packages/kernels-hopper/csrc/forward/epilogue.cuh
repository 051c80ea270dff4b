// SPDX-License-Identifier: Apache-2.0
// From accumulators to the output tensors.
#pragma once

#include "../ptx/stmatrix.cuh"
#include "softmax.cuh"

namespace magi::forward {

// Where one of a thread's two rows goes.
struct OutputRow {
    int token, head;
    bool inside;  // the token exists

    template <typename Type>
    __device__ __forceinline__ Type* of_out(Results const& p, int head_dim) const {
        return static_cast<Type*>(p.out) + (static_cast<int64_t>(token) * p.num_heads + head) * head_dim;
    }
    __device__ __forceinline__ float* of_lse(Results const& p) const {
        return p.lse + token * p.lse_token + head * p.lse_head;
    }
};

// Two elements each, `after` and `weight` times `before`.
template <typename Element>
__device__ __forceinline__ uint32_t add_weighted(uint32_t after, uint32_t before, float weight) {
    float2 const a = unpack(after, Element{}), b = unpack(before, Element{});
    return pack(fmaf(b.x, weight, a.x), fmaf(b.y, weight, a.y), Element{});
}

// Adds `weight` times what is there already.
template <typename T>
__device__ __forceinline__ void store_elements(Results const& p, float const (&o)[T::kHeadDimV / 2], int r,
                                               OutputRow row, float weight) {
    using Element = typename T::Element;
    auto* target = row.of_out<Element>(p, T::kHeadDimV) + threadIdx.x % 4 * 8;
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
            auto* const place = reinterpret_cast<uint4*>(target + column);
            if (weight != 0) {
                uint4 const before = *place;
                words[0] = add_weighted<Element>(words[0], before.x, weight);
                words[1] = add_weighted<Element>(words[1], before.y, weight);
                words[2] = add_weighted<Element>(words[2], before.z, weight);
                words[3] = add_weighted<Element>(words[3], before.w, weight);
            }
            *place = make_uint4(words[0], words[1], words[2], words[3]);
        }
    }
}

template <typename T>
__device__ __forceinline__ void store_floats(Results const& p, float const (&o)[T::kHeadDimV / 2], int r, OutputRow row,
                                             float weight) {
    if (!row.inside) return;
    float* target = row.of_out<float>(p, T::kHeadDimV) + threadIdx.x % 4 * 2;
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
__device__ __forceinline__ void store_row(Results const& p, Softmax<T> const& softmax, float (&o)[T::kHeadDimV / 2],
                                          OutputRow row) {
    float factor, weight_before = 0;
    float lse = softmax.finish(R, factor);
    if (p.merges && row.inside) {
        float const before = *row.of_lse(p);
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
        store_elements<T>(p, o, R, row, weight_before);
    }
    if (row.inside && threadIdx.x % 4 == 0) *row.of_lse(p) = lse;
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
__device__ __forceinline__ void store_max_logits(Results const& p, Softmax<T> const& softmax, OutputRow const (&rows)[2]) {
    if (threadIdx.x % 4 != 0) return;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        if (rows[r].inside && softmax.largest[r] != -INFINITY) {
            atomic_max(p.max_logits + rows[r].head, softmax.largest[r] * softmax.p.scale);
        }
    }
}

// Writes one of a thread's two rows as elements, over what is there. All in one piece: code that runs once a tile comes
// from far, and every jump in it waits.
template <typename T>
__device__ __forceinline__ void store_plainly(Results const& p, Softmax<T> const& softmax,
                                              float const (&o)[T::kHeadDimV / 2], int r, OutputRow row) {
    using Element = typename T::Element;
    float factor;
    float const lse = softmax.finish(r, factor);
    auto* const target = row.of_out<Element>(p, T::kHeadDimV) + threadIdx.x % 4 * 8;
#pragma unroll
    for (int column = 0; column < T::kHeadDimV; column += 32) {
        uint32_t words[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int const i = column / 2 + 4 * j + 2 * r;
            words[j] = pack(o[i] * factor, o[i + 1] * factor, Element{});
        }
        transpose_quad(words);
        if (row.inside) {
            *reinterpret_cast<uint4*>(target + column) = make_uint4(words[0], words[1], words[2], words[3]);
        }
    }
    if (row.inside && threadIdx.x % 4 == 0) *row.of_lse(p) = lse;
}

// Writes a thread's part of a tile.
template <typename T>
__device__ __forceinline__ void store(Results const& p, Softmax<T> const& softmax, float (&o)[T::kHeadDimV / 2],
                                      OutputRow const (&rows)[2]) {
    if (p.max_logits != nullptr) store_max_logits<T>(p, softmax, rows);
    if (T::kStagesOut || p.merges || p.out_is_float) {
        store_row<T, 0>(p, softmax, o, rows[0]);
        store_row<T, 1>(p, softmax, o, rows[1]);
    } else {
        store_plainly<T>(p, softmax, o, 0, rows[0]);
        store_plainly<T>(p, softmax, o, 1, rows[1]);
    }
}

// Writes a thread's part of a tile, but for the output, which goes to shared memory, where the copy engine takes it from.
template <typename T>
__device__ __forceinline__ void stage(Results const& p, Softmax<T> const& softmax, float const (&o)[T::kHeadDimV / 2],
                                      OutputRow const (&rows)[2], uint8_t* target) {
    using Tile = typename T::TileOut;
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float const lse = softmax.finish(r, factor[r]);
        if (rows[r].inside && threadIdx.x % 4 == 0) *rows[r].of_lse(p) = lse;
    }
    int const lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane % 16;
    uint32_t const address = ptx::shared_address(target);
#pragma unroll
    for (int column = 0; column < T::kHeadDimV; column += 16) {
        uint32_t words[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int const i = column / 2 + 2 * j;
            words[j] = pack(o[i] * factor[j % 2], o[i + 1] * factor[j % 2], typename T::Element{});
        }
        ptx::stmatrix_x4(address + Tile::offset(row, column + lane / 16 * 8), words);
    }
}

}  // namespace magi::forward
