// SPDX-License-Identifier: Apache-2.0
// The functions of csrc/arithmetic.cuh that are written in PTX.
#pragma once

#include <cmath>

#include "grid.h"

namespace magi {

inline float exp2_approx(float x) { return std::exp2(x); }
inline float reciprocal_approx(float x) { return 1 / x; }
inline float2 unpack_here(uint32_t word, __nv_bfloat16) {
    return __bfloat1622float2(reinterpret_cast<__nv_bfloat162&>(word));
}
inline float2 unpack_here(uint32_t word, __half) { return __half22float2(reinterpret_cast<__half2&>(word)); }

}  // namespace magi
