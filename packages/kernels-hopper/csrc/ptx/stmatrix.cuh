// SPDX-License-Identifier: Apache-2.0
// Stores of 8x8 matrices of 16-bit elements from the registers of a warp.
#pragma once

#include "mbarrier.cuh"

namespace magi::ptx {

// Stores four matrices, transposed: lane 8 m + c gives the shared address at which column c of matrix m goes, as 16
// bytes; its lanes hold rows lane / 4 and columns lane % 4 * 2 and the next of each matrix.
__device__ __forceinline__ void stmatrix_x4_trans(uint32_t address, uint32_t const (&matrices)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared::cta.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
                 "r"(matrices[0]), "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3])
                 : "memory");
}

// The same without transposing: lane 8 m + r gives the address at which row r of matrix m goes.
__device__ __forceinline__ void stmatrix_x4(uint32_t address, uint32_t const (&matrices)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared::cta.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
                 "r"(matrices[0]), "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3])
                 : "memory");
}

}  // namespace magi::ptx
