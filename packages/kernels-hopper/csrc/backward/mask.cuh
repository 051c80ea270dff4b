// SPDX-License-Identifier: Apache-2.0
// Which of a thread's scores count: one bit for each row of queries, from the pieces of the mask.
#pragma once

#include "../layout.cuh"
#include "params.cuh"

namespace magi::backward {

__device__ __forceinline__ uint32_t low_bits(int count) { return count >= 32 ? ~0u : (1u << count) - 1; }

// Sets the bits of the scores that a thread has of two keys and of the tile of queries of a step.
template <int TileM>
__device__ __forceinline__ void mask_of_tile(Params const& p, int4 step, int const (&key)[2], uint32_t (&bits)[2]) {
    constexpr int kBits = TileM / 4;
    int const tokens = TileM >> p.log2_pack;
#pragma unroll
    for (int r = 0; r < 2; r++) bits[r] = 0;
    for (int i = 0; i < step.z; i++) {
        int4 const band = __ldg(p.pieces + 2 * (step.y + i));
        int4 const keys = __ldg(p.pieces + 2 * (step.y + i) + 1);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int const from = min(max(max(band.x, key[r] + band.z) - step.x, 0), tokens) << p.log2_pack;
            int const to = min(max(min(band.y, key[r] + band.w + 1) - step.x, 0), tokens) << p.log2_pack;
            int const skipped = min(max(columns_before(threadIdx.x, from), 0), kBits);
            int const reached = min(max(columns_before(threadIdx.x, to), 0), kBits);
            bool const inside = static_cast<uint32_t>(key[r] - keys.x) < static_cast<uint32_t>(keys.y - keys.x);
            bits[r] |= inside ? low_bits(reached) & ~low_bits(skipped) : 0;
        }
    }
}

template <int Count>
__device__ __forceinline__ void apply_mask(float (&scores)[Count], uint32_t const (&bits)[2]) {
#pragma unroll
    for (int i = 0; i < Count; i++) {
        if (!(bits[i / 2 % 2] >> (i / 4 * 2 + i % 2) & 1)) scores[i] = -INFINITY;
    }
}

}  // namespace magi::backward
