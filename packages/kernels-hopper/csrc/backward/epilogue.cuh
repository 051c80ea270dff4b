// SPDX-License-Identifier: Apache-2.0
// From accumulators to the gradients of keys and values.
#pragma once

#include "../arithmetic.cuh"
#include "../ptx/barrier.cuh"
#include "../ptx/global.cuh"
#include "schedule.cuh"
#include "traits.cuh"

namespace magi::backward {

// Writes `factor` times a consumer's accumulators, of up to 64 keys, to a tensor [all keys, heads, Dim].
template <typename T, int Dim>
__device__ __forceinline__ void store_rows(float const (&values)[Dim / 2], void* tensor, int mode,
                                           KeyRange keys, int heads, int head, float factor) {
    int const lane = threadIdx.x % 4;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int const key = keys.first + accumulator_row(threadIdx.x % 128, 2 * r);
        int64_t const row = (static_cast<int64_t>(key) * heads + head) * Dim;
        bool const inside = key < keys.end;
        if (mode == kAddFloats) {
            auto* const target = static_cast<float*>(tensor) + row + 2 * lane;
#pragma unroll
            for (int column = 0; column < Dim; column += 8) {
                int const i = column / 2 + 2 * r;
                if (inside) ptx::red_add(target + column, values[i] * factor, values[i + 1] * factor);
            }
        } else if (mode == kFloats) {
            auto* const target = static_cast<float*>(tensor) + row + 2 * lane;
#pragma unroll
            for (int column = 0; column < Dim; column += 8) {
                int const i = column / 2 + 2 * r;
                float2 const pair = make_float2(values[i] * factor, values[i + 1] * factor);
                if (inside) *reinterpret_cast<float2*>(target + column) = pair;
            }
        } else {
            auto* const target = static_cast<typename T::Element*>(tensor) + row + 8 * lane;
#pragma unroll
            for (int column = 0; column < Dim; column += 32) {
                uint32_t words[4];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    int const i = column / 2 + 4 * j + 2 * r;
                    words[j] = pack(values[i] * factor, values[i + 1] * factor, typename T::Element{});
                }
                transpose_quad(words);
                uint4 const vector = make_uint4(words[0], words[1], words[2], words[3]);
                if (inside) *reinterpret_cast<uint4*>(target + column) = vector;
            }
        }
    }
}

// Where somebody waits for the gradients of a tile, counts a consumer that has written its own; the last one of all tells.
__device__ __forceinline__ void tell_written(Params const& p, int tile, int group) {
    if (p.num_awaited == 0 || (__ldg(&p.keys[tile].z) & kAwaited) == 0) return;
    ptx::barrier_sync(kOwnBarrier + group, 128);
    if (threadIdx.x % 128 != 0) return;
    if (ptx::add_acquire_release(p.awaited_done, 1) + 1 == p.num_awaited) ptx::add_release_system(p.awaited_there, 1);
}

// Adds what the item of the same keys before has computed to a consumer's accumulators, and hands the sums on to the next
// item, if there are any. True if there is no next one, so that these are the gradients.
template <typename T, int Count>
__device__ __forceinline__ bool exchange_with_items(Params const& p, Item const& item, int group, float (&dk)[Count],
                                                    float (&dv)[Count]) {
    if (item.packs == p.packs_per_kv_head) return true;
    int const place = (item.tile * p.num_kv_heads + item.kv_head) * kConsumers + group, thread = threadIdx.x % 128;
    auto* const partial =
        reinterpret_cast<float4*>(p.partial) + static_cast<int64_t>(place) * (2 * Count / 4 * 128) + thread;
    if (item.number() > 0) {
        if (thread == 0) {
            while (ptx::load_acquire(p.items_done + place) < item.number()) continue;
        }
        ptx::barrier_sync(kOwnBarrier + group, 128);
#pragma unroll
        for (int i = 0; i < Count; i += 4) {
            float4 const a = partial[i * 32], b = partial[(Count + i) * 32];
            dk[i] += a.x, dk[i + 1] += a.y, dk[i + 2] += a.z, dk[i + 3] += a.w;
            dv[i] += b.x, dv[i + 1] += b.y, dv[i + 2] += b.z, dv[i + 3] += b.w;
        }
    }
    if (item.is_last(p)) return true;
#pragma unroll
    for (int i = 0; i < Count; i += 4) {
        partial[i * 32] = make_float4(dk[i], dk[i + 1], dk[i + 2], dk[i + 3]);
        partial[(Count + i) * 32] = make_float4(dv[i], dv[i + 1], dv[i + 2], dv[i + 3]);
    }
    ptx::barrier_sync(kOwnBarrier + group, 128);
    if (thread == 0) ptx::store_release(p.items_done + place, item.number() + 1);
    return false;
}

}  // namespace magi::backward
