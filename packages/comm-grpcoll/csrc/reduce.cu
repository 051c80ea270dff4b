// SPDX-License-Identifier: Apache-2.0
// Combines the partial results that came back for each row: in float32, in the order of the source ranks, rounded once.
// The same bits as the core's sum (magi_attention.comm.reduction), whatever brought the partial results.
//
// places[offsets[i] .. offsets[i + 1]) number the slots' rows that belong to row rows[i] of `into`, which is the first
// term. blockDim = (threads of a row, rows of a block).
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math_constants.h>
#include <stdint.h>

namespace magi {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void round_to(float x, float* y) { *y = x; }
__device__ __forceinline__ void round_to(float x, __half* y) { *y = __float2half_rn(x); }
__device__ __forceinline__ void round_to(float x, __nv_bfloat16* y) { *y = __float2bfloat16_rn(x); }

// kWidth elements, read and written as one.
template <typename T, int kWidth>
struct __align__(sizeof(T) * kWidth) Vector {
    T x[kWidth];
};

struct Segments {
    const int32_t* __restrict__ rows;
    const int32_t* __restrict__ offsets;
    const int32_t* __restrict__ places;
    int32_t num_rows;
};

template <typename In, typename Out, int kWidth>
__device__ __forceinline__ void add(Out* into, const In* __restrict__ slots, const Segments segments,
                                    int32_t num_columns, bool average) {
    const int32_t segment = blockIdx.x * blockDim.y + threadIdx.y;
    if (segment >= segments.num_rows) return;
    const int32_t begin = segments.offsets[segment], end = segments.offsets[segment + 1];
    Out* target = into + static_cast<int64_t>(segments.rows[segment]) * num_columns;
    const float num_terms = static_cast<float>(1 + end - begin);
    for (int32_t column = threadIdx.x * kWidth; column < num_columns; column += blockDim.x * kWidth) {
        auto& destination = *reinterpret_cast<Vector<Out, kWidth>*>(target + column);
        auto result = destination;
        float total[kWidth];
#pragma unroll
        for (int i = 0; i < kWidth; ++i) total[i] = to_float(result.x[i]);
        for (int32_t n = begin; n < end; ++n) {
            const In* term = slots + static_cast<int64_t>(segments.places[n]) * num_columns + column;
            const auto values = *reinterpret_cast<const Vector<In, kWidth>*>(term);
#pragma unroll
            for (int i = 0; i < kWidth; ++i) total[i] += to_float(values.x[i]);
        }
#pragma unroll
        for (int i = 0; i < kWidth; ++i) round_to(average ? __fdiv_rn(total[i], num_terms) : total[i], &result.x[i]);
        destination = result;
    }
}

// Weights every term by exp(its lse - the largest). Terms whose lse is -inf stand for no keys and are skipped, whatever
// they hold. Several threads read a row's old lse, so it is another buffer than the one that is written.
template <typename In, typename Out, int kWidth>
__device__ __forceinline__ void merge(Out* into, float* __restrict__ into_lse, const float* __restrict__ old_lse,
                                      const In* __restrict__ slots, const float* __restrict__ slots_lse,
                                      const Segments segments, int32_t num_heads, int32_t head_dim) {
    const int32_t segment = blockIdx.x * blockDim.y + threadIdx.y;
    if (segment >= segments.num_rows) return;
    const int32_t begin = segments.offsets[segment], end = segments.offsets[segment + 1];
    const int64_t row = segments.rows[segment], num_columns = static_cast<int64_t>(num_heads) * head_dim;
    for (int32_t column = threadIdx.x * kWidth; column < num_columns; column += blockDim.x * kWidth) {
        const int32_t head = column / head_dim;
        const float old = old_lse[row * num_heads + head];
        auto lse_of = [&](int32_t n) { return slots_lse[static_cast<int64_t>(segments.places[n]) * num_heads + head]; };
        float largest = old;
        for (int32_t n = begin; n < end; ++n) largest = fmaxf(largest, lse_of(n));
        auto& destination = *reinterpret_cast<Vector<Out, kWidth>*>(into + row * num_columns + column);
        auto result = destination;
        float total[kWidth] = {}, weights = 0.0f;
        if (old != -CUDART_INF_F) {
            weights = expf(old - largest);
#pragma unroll
            for (int i = 0; i < kWidth; ++i) total[i] = weights * to_float(result.x[i]);
        }
        for (int32_t n = begin; n < end; ++n) {
            const float lse = lse_of(n);
            if (lse == -CUDART_INF_F) continue;
            const float weight = expf(lse - largest);
            const In* term = slots + static_cast<int64_t>(segments.places[n]) * num_columns + column;
            const auto values = *reinterpret_cast<const Vector<In, kWidth>*>(term);
            weights += weight;
#pragma unroll
            for (int i = 0; i < kWidth; ++i) total[i] = fmaf(weight, to_float(values.x[i]), total[i]);
        }
#pragma unroll
        for (int i = 0; i < kWidth; ++i)
            round_to(weights > 0.0f ? __fdiv_rn(total[i], weights) : 0.0f, &result.x[i]);
        destination = result;
        if (column % head_dim == 0)
            into_lse[row * num_heads + head] = weights > 0.0f ? largest + logf(weights) : -CUDART_INF_F;
    }
}

}  // namespace magi

#define MAGI_REDUCE(NAME, IN, OUT, WIDTH)                                                                             \
    extern "C" __global__ void __launch_bounds__(256)                                                                 \
        add_##NAME##_##WIDTH(OUT* into, const IN* slots, const int32_t* rows, const int32_t* offsets,                 \
                             const int32_t* places, int32_t num_rows, int32_t num_columns, int32_t average) {         \
        magi::add<IN, OUT, WIDTH>(into, slots, {rows, offsets, places, num_rows}, num_columns, average);              \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(256)                                                                 \
        merge_##NAME##_##WIDTH(OUT* into, float* into_lse, const float* old_lse, const IN* slots,                     \
                               const float* slots_lse, const int32_t* rows, const int32_t* offsets,                   \
                               const int32_t* places, int32_t num_rows, int32_t num_heads, int32_t head_dim) {        \
        magi::merge<IN, OUT, WIDTH>(into, into_lse, old_lse, slots, slots_lse, {rows, offsets, places, num_rows},     \
                                    num_heads, head_dim);                                                             \
    }

// Widths of 16 bytes of the wider type, and single elements for what they don't divide.
#define MAGI_REDUCE_BOTH(NAME, IN, OUT, WIDTH) \
    MAGI_REDUCE(NAME, IN, OUT, WIDTH)          \
    MAGI_REDUCE(NAME, IN, OUT, 1)

MAGI_REDUCE_BOTH(bfloat16_bfloat16, __nv_bfloat16, __nv_bfloat16, 8)
MAGI_REDUCE_BOTH(bfloat16_float32, __nv_bfloat16, float, 4)
MAGI_REDUCE_BOTH(float16_float16, __half, __half, 8)
MAGI_REDUCE_BOTH(float16_float32, __half, float, 4)
MAGI_REDUCE_BOTH(float32_float32, float, float, 4)
MAGI_REDUCE_BOTH(float32_bfloat16, float, __nv_bfloat16, 4)
MAGI_REDUCE_BOTH(float32_float16, float, __half, 4)
