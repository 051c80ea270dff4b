// SPDX-License-Identifier: Apache-2.0
// Which of a thread's scores count: one bit each, from the pieces of the mask.
#pragma once

#include "schedule.cuh"
#include "../layout.cuh"

namespace magi::forward {

__device__ __forceinline__ uint32_t low_bits(int count) { return (1u << count) - 1; }

// Sets a bit for each of the scores of a box that the thread has in the rows of two tokens.
template <int BoxN>
__device__ __forceinline__ void mask_of_box(Params const& p, int4 run, int box, int const (&token)[2],
                                            uint32_t (&bits)[2]) {
    constexpr int kBits = BoxN / 4;
    bits[0] = bits[1] = run.w < 0 ? (1u << kBits) - 1 : 0;
    for (int i = 0; i < run.w; i++) {
        int4 const band = __ldg(p.pieces + 2 * (run.z + i));
        int4 const rows = __ldg(p.pieces + 2 * (run.z + i) + 1);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int const from = max(band.x, token[r] + band.z) - box;
            int const to = min(min(band.y, token[r] + band.w + 1), run.y) - box;
            int const skipped = min(max(columns_before(threadIdx.x, from), 0), kBits);
            int const reached = min(max(columns_before(threadIdx.x, to), 0), kBits);
            bool const inside = static_cast<uint32_t>(token[r] - rows.x) < static_cast<uint32_t>(rows.y - rows.x);
            bits[r] |= inside ? low_bits(reached) & ~low_bits(skipped) : 0;
        }
    }
}

// The bits of a whole tile, which is two boxes.
template <int BoxN>
__device__ __forceinline__ void mask_of_tile(Params const& p, BoxCursor<BoxN>& cursor, int const (&token)[2],
                                             uint32_t (&bits)[2][2]) {
#pragma unroll
    for (int b = 0; b < 2; b++) {
        int const box = cursor.next();
        mask_of_box<BoxN>(p, cursor.run, box, token, bits[b]);
    }
}

template <int BoxN, int Count>
__device__ __forceinline__ void apply_mask(float (&scores)[Count], uint32_t const (&bits)[2][2]) {
#pragma unroll
    for (int i = 0; i < Count; i++) {
        int const within = i % (BoxN / 2);
        if (!(bits[i / (BoxN / 2)][i / 2 % 2] >> (within / 4 * 2 + within % 2) & 1)) scores[i] = -INFINITY;
    }
}

}  // namespace magi::forward
