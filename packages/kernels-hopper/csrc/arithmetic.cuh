// SPDX-License-Identifier: Apache-2.0
// Fast functions of single precision, and conversion to elements.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace magi {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ uint32_t pack(float a, float b, __nv_bfloat16) {
    __nv_bfloat162 const pair = __floats2bfloat162_rn(a, b);
    return reinterpret_cast<uint32_t const&>(pair);
}
__device__ __forceinline__ uint32_t pack(float a, float b, __half) {
    __half2 const pair = __floats2half2_rn(a, b);
    return reinterpret_cast<uint32_t const&>(pair);
}

__device__ __forceinline__ float2 unpack(uint32_t word, __nv_bfloat16) {
    return __bfloat1622float2(reinterpret_cast<__nv_bfloat162 const&>(word));
}
__device__ __forceinline__ float2 unpack(uint32_t word, __half) {
    return __half22float2(reinterpret_cast<__half2 const&>(word));
}

// The same, at this place of the program: until then the word takes one register, not two.
__device__ __forceinline__ float2 unpack_here(uint32_t word, __nv_bfloat16) {
    float2 pair;
    asm volatile("shl.b32 %0, %2, 16;\nand.b32 %1, %2, 0xFFFF0000;" : "=f"(pair.x), "=f"(pair.y) : "r"(word));
    return pair;
}
__device__ __forceinline__ float2 unpack_here(uint32_t word, __half) {
    float2 pair;
    asm volatile("{\n.reg .f16 a, b;\nmov.b32 {a, b}, %2;\ncvt.f32.f16 %0, a;\ncvt.f32.f16 %1, b;\n}"
                 : "=f"(pair.x), "=f"(pair.y)
                 : "r"(word));
    return pair;
}

// Accumulators of a product to fragments of the left operand of the next one, 16 columns in each.
template <typename Element, int Count, int Fragments>
__device__ __forceinline__ void to_fragments(float const (&values)[Count], uint32_t (&fragments)[Fragments][4]) {
    static_assert(Count <= 8 * Fragments, "the first fragments are filled");
#pragma unroll
    for (int i = 0; i < Count / 2; i++) {
        fragments[i / 4][i % 4] = pack(values[2 * i], values[2 * i + 1], Element{});
    }
}

// What one of four neighboring threads holds of four others' words becomes four words of its own: w[j] of thread i
// and w[i] of thread j change places.
__device__ __forceinline__ void exchange(uint32_t& low, uint32_t& high, int bit) {
    bool const upper = threadIdx.x & bit;
    uint32_t const received = __shfl_xor_sync(~0u, upper ? low : high, bit);
    if (upper) {
        low = received;
    } else {
        high = received;
    }
}
__device__ __forceinline__ void transpose_quad(uint32_t (&w)[4]) {
    exchange(w[0], w[1], 1);
    exchange(w[2], w[3], 1);
    exchange(w[0], w[2], 2);
    exchange(w[1], w[3], 2);
}

}  // namespace magi
