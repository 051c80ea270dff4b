// SPDX-License-Identifier: Apache-2.0
// Transposition of a matrix of 16-bit elements in the registers of a warp.
#pragma once

#include <cstdint>

namespace magi::ptx {

// Of a matrix of 8 rows and columns, each lane has row lane / 4, columns lane % 4 * 2 and the next.
__device__ __forceinline__ uint32_t movmatrix_trans(uint32_t word) {
    uint32_t transposed;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(word));
    return transposed;
}

}  // namespace magi::ptx
