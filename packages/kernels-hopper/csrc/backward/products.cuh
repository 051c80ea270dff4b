// SPDX-License-Identifier: Apache-2.0
// The products of a backward kernel, started by a warpgroup and not waited for.
#pragma once

#include "../ptx/wgmma.cuh"
#include "traits.cuh"

namespace magi::backward {

// The shared address of a tile, which the compiler is told to be the same in the whole warp.
__device__ __forceinline__ uint32_t uniform_address(void const* tile) {
    return __shfl_sync(~0u, ptx::shared_address(tile), 0);
}

// sums = a b^T, with 64 rows of a: both are contiguous along the columns, over which is summed.
template <typename Element, typename TileA, typename TileB>
__device__ __forceinline__ void multiply_columns(float (&sums)[TileB::kRows / 2], void const* a, int first_row,
                                                 void const* b) {
    uint64_t const of_a = TileA::k_major(uniform_address(a)) + first_row / 64 * TileA::from(64, 0);
    uint64_t const of_b = TileB::k_major(uniform_address(b));
#pragma unroll
    for (int column = 0; column < TileA::kColumns; column += 16) {
        ptx::Wgmma<TileB::kRows>::template ss<Element, 0, 0>(sums, of_a + TileA::from(0, column),
                                                             of_b + TileB::from(0, column), column > 0);
    }
}

// The same, where the first columns of a are fragments.
template <typename Element, typename TileA, typename TileB, int Count>
__device__ __forceinline__ void multiply_columns(float (&sums)[TileB::kRows / 2], uint32_t const (&fragments)[Count][4],
                                                 void const* a, int first_row, void const* b) {
    uint64_t const of_a = TileA::k_major(uniform_address(a)) + first_row / 64 * TileA::from(64, 0);
    uint64_t const of_b = TileB::k_major(uniform_address(b));
#pragma unroll
    for (int column = 0; column < TileA::kColumns; column += 16) {
        if (column / 16 < Count) {
            ptx::Wgmma<TileB::kRows>::template rs<Element, 0>(sums, fragments[column / 16], of_b + TileB::from(0, column),
                                                              column > 0);
        } else {
            ptx::Wgmma<TileB::kRows>::template ss<Element, 0, 0>(sums, of_a + TileA::from(0, column),
                                                                 of_b + TileB::from(0, column), true);
        }
    }
}

// sums += fragments b, over the rows of b.
template <typename Element, typename TileB>
__device__ __forceinline__ void multiply_rows(float (&sums)[TileB::kColumns / 2],
                                              uint32_t const (&fragments)[TileB::kRows / 16][4], void const* b) {
    uint64_t const of_b = TileB::mn_major(uniform_address(b));
#pragma unroll
    for (int row = 0; row < TileB::kRows; row += 16) {
        ptx::Wgmma<TileB::kColumns>::template rs<Element, 1>(sums, fragments[row / 16],
                                                             of_b + TileB::from(row, 0), true);
    }
}

// A part of dq = ds k, over keys; see Traits. A part that is no multiple of a panel takes two products.
template <typename T>
__device__ __forceinline__ void multiply_scores(float (&dq)[T::kDqRegisters], void const* ds, void const* k, int part,
                                                int pass = 0) {
    using Element = typename T::Element;
    uint64_t const of_ds = T::TileDs::k_major(uniform_address(ds));
    uint64_t const of_k = T::TileK::mn_major(uniform_address(k));
    uint64_t const whole = of_k + T::TileK::from(0, T::dq_whole_column(1)) * part +
                           T::TileK::from(0, T::kDqWhole) * pass;
    uint64_t const half = of_k + T::TileK::from(0, T::dq_half_column(0)) + (T::kDqHalf * 2 >> 4) * part;
#pragma unroll
    for (int key = 0; key < T::kTileN; key += 16) {
        uint64_t const a = of_ds + T::TileDs::from(0, key);
        if constexpr (T::kDqWhole > 0) {
            using Whole = float[T::kDqWhole / 2];
            ptx::Wgmma<T::kDqWhole>::template ss<Element, 0, 1>(reinterpret_cast<Whole&>(dq[0]), a,
                                                                whole + T::TileK::from(key, 0), key > 0);
        }
        if constexpr (T::kDqHalf > 0) {
            using Half = float[T::kDqHalf / 2];
            ptx::Wgmma<T::kDqHalf>::template ss<Element, 0, 1>(reinterpret_cast<Half&>(dq[T::kDqWhole / 2]), a,
                                                               half + T::TileK::from(key, 0), key > 0);
        }
    }
}

// A part of dq^T = k^T ds^T, over keys: 64 columns of dq.
template <typename T>
__device__ __forceinline__ void multiply_scores_transposed(float (&dq)[T::kDqRegisters], void const* ds, void const* k,
                                                           int part) {
    using Element = typename T::Element;
            uint64_t const a = T::TileK::mn_major(uniform_address(k)) + T::TileK::from(0, 64) * part;
            uint64_t const b = T::TileDs::k_major(uniform_address(ds));
#pragma unroll
            for (int key = 0; key < T::kTileN; key += 16) {
                ptx::Wgmma<T::kTileM>::template ss<Element, 1, 0>(dq, a + T::TileK::from(key, 0), b + T::TileDs::from(0, key),
                                                                 key > 0);
            }
}

}  // namespace magi::backward
