// SPDX-License-Identifier: Apache-2.0
// Stores to shared memory where the compiler does not see what a pointer is derived from: it would take generic ones,
// which are slower themselves, and make the fence after them so.
#pragma once

#include "mbarrier.cuh"

namespace magi::ptx {

__device__ __forceinline__ void store_shared(uint32_t address, float x, float y, float z, float w) {
    asm volatile("st.shared::cta.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(x), "f"(y), "f"(z), "f"(w)
                 : "memory");
}

}  // namespace magi::ptx
