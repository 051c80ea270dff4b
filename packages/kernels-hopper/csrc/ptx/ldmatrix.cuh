// SPDX-License-Identifier: Apache-2.0
// Loads of 8x8 matrices of 16-bit elements into the registers of a warp.
#pragma once

#include "mbarrier.cuh"

namespace magi::ptx {

// Loads four matrices: lane 8 m + r gives the shared address of row r of matrix m, 16 bytes; its lanes get rows lane / 4
// and columns lane % 4 * 2 and the next of each matrix.
__device__ __forceinline__ void ldmatrix_x4(uint32_t address, uint32_t (&matrices)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared::cta.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(address)
                 : "memory");
}

}  // namespace magi::ptx
