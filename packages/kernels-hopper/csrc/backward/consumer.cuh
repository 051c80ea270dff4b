// SPDX-License-Identifier: Apache-2.0
// What the consumers of both kinds of backward kernels do alike: elementwise work, and the exchange of its results.
// Scores are computed transposed, keys by queries, so that probabilities and their gradients are left operands in
// registers of the products that give the gradients of values and keys. Those of queries need what all consumers have,
// and go through shared memory; they are computed one step late, so that consumers need not wait for each other, and the
// elementwise work of one runs while the other's products do.
#pragma once

#include "../ptx/barrier.cuh"
#include "../ptx/cp_async_bulk.cuh"
#include "../ptx/stmatrix.cuh"
#include "../ring.cuh"
#include "epilogue.cuh"
#include "mask.cuh"
#include "products.cuh"
#include "schedule.cuh"
#include "shared.cuh"
#include "sums.cuh"

namespace magi::backward {

template <typename T>
using Scores = float[T::kTileM / 2];
template <typename T>
using Fragments = uint32_t[T::kTileM / 16][4];
template <typename T>
using Dq = float[T::kDqRegisters];

// The terms that this thread reads, of all that a tile has of one kind.
template <typename T>
__device__ __forceinline__ float const* terms_of_thread(float const* terms) {
    return terms + threadIdx.x % 4 * T::kTermStride;
}

// Of these, the terms of pair j. Two pairs are read at once: the compiler leaves out the second reading.
__device__ __forceinline__ float2 terms_of(float const* terms, int j) {
    float4 const two = *reinterpret_cast<float4 const*>(terms + j / 2 * 4);
    return j % 2 == 0 ? make_float2(two.x, two.y) : make_float2(two.z, two.w);
}

// Scores to probabilities, which are `fragments` too; under a cap, what is left in the scores is what their gradients
// are multiplied by: cap * tanh(x / cap) has the slope 1 - tanh(x / cap)^2. `lse` is that of the thread's first row.
template <typename T, typename P>
__device__ __forceinline__ void to_probabilities(P const& p, Scores<T>& scores, Fragments<T>& fragments,
                                                 float const* lse) {
#pragma unroll
    for (int j = 0; j < T::kTileM / 8; j++) {
        float2 const of_rows = terms_of(lse, j);
        float value[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
            float& x = scores[4 * j + e];
            float const minus = e % 2 ? of_rows.y : of_rows.x;
            if constexpr (T::kSoftcap) {
                float const tanh = 1 - 2 * reciprocal_approx(exp2_approx(x * p.cap_slope) + 1);
                value[e] = x == -INFINITY ? 0 : exp2_approx(fmaf(tanh, p.cap, -minus));
                x = value[e] * (1 - tanh * tanh);
            } else {
                value[e] = x = exp2_approx(fmaf(x, p.to_log2, -minus));
            }
        }
        fragments[j / 2][j % 2 * 2] = pack(value[0], value[1], typename T::Element{});
        fragments[j / 2][j % 2 * 2 + 1] = pack(value[2], value[3], typename T::Element{});
    }
}

// Gradients of probabilities to those of scores, but for the scale. `factors` are the probabilities or, under a cap,
// what was left of the scores.
template <typename T>
__device__ __forceinline__ void to_score_gradients(Scores<T> const& factors, Scores<T>& ds, Fragments<T>& fragments,
                                                   float const* delta) {
#pragma unroll
    for (int j = 0; j < T::kTileM / 8; j++) {
        float2 const of_rows = terms_of(delta, j);
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int const i = 4 * j + e;
            ds[i] = factors[i] * (ds[i] - (e % 2 ? of_rows.y : of_rows.x));
        }
    }
    to_fragments<typename T::Element>(ds, fragments);
}

// The same with probabilities as they were rounded for the product with the gradients of outputs.
template <typename T>
__device__ __forceinline__ void rounded_to_score_gradients(Fragments<T> const& probabilities, Scores<T> const& ds,
                                                           Fragments<T>& fragments, float const* delta) {
#pragma unroll
    for (int i = 0; i < T::kTileM / 16; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float2 const of_rows = terms_of(delta, 2 * i + j / 2);
            float2 const factor = unpack_here(probabilities[i][j], typename T::Element{});
            int const e = 8 * i + 2 * j;
            fragments[i][j] =
                pack(factor.x * (ds[e] - of_rows.x), factor.y * (ds[e + 1] - of_rows.y), typename T::Element{});
        }
    }
}

// Which of a thread's scores of 64 keys count, in a step that has a mask.
template <typename T>
struct StepMask {
    bool const exists;
    uint32_t bits[2];

    __device__ __forceinline__ StepMask(Params const& p, int4 step, int first_key) : exists(step.z >= 0) {
        if (!exists) return;
        int const key = first_key + accumulator_row(threadIdx.x % 128, 0);
        int const keys[2] = {key, key + 8};
        mask_of_tile<T::kTileM>(p, step, keys, bits);
    }

    __device__ __forceinline__ void apply(Scores<T>& scores) const {
        if (exists) apply_mask(scores, bits);
    }
};

// Gradients of scores to shared memory, queries by keys, of which these 64 begin at `first_column`.
template <typename T>
__device__ __forceinline__ void store_scores(void* ds, Fragments<T> const& fragments, int first_column) {
    int const lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    int const row = lane % 8 + lane / 16 * 8, column = first_column + 16 * warp + lane / 8 % 2 * 8;
    uint32_t const address = ptx::shared_address(ds) + T::TileDs::offset(row, column);
#pragma unroll
    for (int i = 0; i < T::kTileM / 16; i++) {
        ptx::stmatrix_x4_trans(address + i * 16 * T::TileDs::kSwizzleBytes, fragments[i]);
    }
}

// The item in a slot, which is read again where it is needed, so that it takes no registers in between.
template <typename T>
__device__ __forceinline__ Item item_in(Shared<T> const& s, RingPlace<2> const& place) {
    int4 const slot = *reinterpret_cast<int4 const*>(s.item[place.stage()]);
    return {slot.x, slot.y, slot.z, slot.w >> 16, slot.w & 0xFFFF};
}

// The keys of the item in a slot from some place in its tile on, of all those that there are.
template <typename T>
__device__ __forceinline__ KeyRange keys_in(Shared<T> const& s, RingPlace<2> const& place, int offset) {
    int4 const keys = s.keys[place.stage()];
    return {keys.x + offset, keys.y};
}

template <typename T>
__device__ __forceinline__ Rests rests_in(Shared<T> const& s, RingPlace<2> const& place, int group) {
    int const rests = reinterpret_cast<int const*>(s.keys + place.stage())[2 + group];
    return {rests >> 16, rests & (kAwaited - 1)};
}

template <typename T>
__device__ __forceinline__ Item next_item(Shared<T>& s, RingPlace<2> const& place) {
    ptx::mbarrier_try_wait_parity(&s.item_full[place.stage()], place.parity());
    return item_in(s, place);
}

template <typename T>
__device__ __forceinline__ void leave_item(Shared<T>& s, RingPlace<2>& place) {
    arrive_warp(&s.item_empty[place.stage()]);
    place.advance();
}

}  // namespace magi::backward
