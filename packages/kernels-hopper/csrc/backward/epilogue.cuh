// SPDX-License-Identifier: Apache-2.0
// From accumulators to the gradients of keys and values.
#pragma once

#include "../arithmetic.cuh"
#include "traits.cuh"

namespace magi::backward {

// Writes `factor` times a consumer's accumulators, of 64 keys from `first_key` on, to a tensor [num_k, heads, head_dim].
template <typename T>
__device__ __forceinline__ void store_rows(float const (&values)[T::kHeadDim / 2], void* tensor, bool is_float,
                                           int first_key, int num_k, int heads, int head, float factor) {
    int const lane = threadIdx.x % 4;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int const key = first_key + accumulator_row(threadIdx.x % 128, 2 * r);
        int64_t const row = (static_cast<int64_t>(key) * heads + head) * T::kHeadDim;
        bool const inside = key < num_k;
        if (is_float) {
            auto* const target = static_cast<float*>(tensor) + row + 2 * lane;
#pragma unroll
            for (int column = 0; column < T::kHeadDim; column += 8) {
                int const i = column / 2 + 2 * r;
                float2 const pair = make_float2(values[i] * factor, values[i + 1] * factor);
                if (inside) *reinterpret_cast<float2*>(target + column) = pair;
            }
        } else {
            auto* const target = static_cast<typename T::Element*>(tensor) + row + 8 * lane;
#pragma unroll
            for (int column = 0; column < T::kHeadDim; column += 32) {
                uint32_t words[4];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    int const i = column / 2 + 4 * j + 2 * r;
                    words[j] = pack(values[i] * factor, values[i + 1] * factor, typename T::Element{});
                }
                transpose_quad(words);
                uint4 const vector = make_uint4(words[0], words[1], words[2], words[3]);
                if (inside) *reinterpret_cast<uint4*>(target + column) = vector;
            }
        }
    }
}

}  // namespace magi::backward
