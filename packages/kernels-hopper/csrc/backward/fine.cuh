// SPDX-License-Identifier: Apache-2.0
// Consumers for masks of small blocks: tiles of 64 keys by 64 rows of queries. Both share the tile of keys, and each takes
// every other tile of queries, of which it computes all: they never wait for each other within an item, so that the
// elementwise work of one runs while the other's products do. Of the gradients of keys and values each has those of its
// own queries; at an item's end they are exchanged, so that one has the keys', the other the values'. Gradients of queries
// are another kernel's (queries.cuh): with so few keys at a time, to add them up in device memory would take longest.
#pragma once

#include "consumer.cuh"

namespace magi::backward {

template <typename T>
struct FineConsumer {
    using Element = typename T::Element;
    using TileK = typename T::TileK;
    using TileQ = typename T::TileQ;

    Params const& p;
    Shared<T>& s;
    int const group;  // which consumer: at last, 0 has the gradients of values, 1 those of keys
    RingPlace<T::kStages> place;  // of this consumer's next tile of queries
    RingPlace<2> item_place;
    RingPlace<1> kv_place;
    bool begins;  // whether the next item's first step is this consumer's
    float dk[T::kHeadDim / 2], dv[T::kHeadDim / 2];

    __device__ __forceinline__ FineConsumer(Params const& p, Shared<T>& s, int group)
        : p(p), s(s), group(group), begins(group == 0) {
        if (!begins) place.advance();
    }

    __device__ __forceinline__ void step(int key) {
        Scores<T> scores, ds;
        Fragments<T> probabilities, fragments;
        int const stage = place.stage();
        ptx::mbarrier_try_wait_parity(&s.q_full[stage], place.parity());
        ptx::wgmma_fence();
        multiply_columns<Element, TileK, TileQ>(scores, s.k, 0, s.q[stage]);
        ptx::wgmma_commit_group();
        ptx::mbarrier_try_wait_parity(&s.dout_full[stage], place.parity());
        ptx::wgmma_fence();
        multiply_columns<Element, TileK, TileQ>(ds, s.v, 0, s.dout[stage]);
        ptx::wgmma_commit_group();
        StepMask<T> const mask(p, s.step[stage], key);
        ptx::wgmma_wait_group<1>();
        ptx::fence_registers(scores);
        mask.apply(scores);
        to_probabilities<T>(p, scores, probabilities, terms_of_thread<T>(s.row_terms[stage][0]));
        ptx::wgmma_fence();
        multiply_rows<Element, TileQ>(dv, probabilities, s.dout[stage]);
        ptx::wgmma_commit_group();
        ptx::wgmma_wait_group<1>();
        ptx::fence_registers(ds);
        to_score_gradients<T>(scores, ds, fragments, terms_of_thread<T>(s.row_terms[stage][1]));
        ptx::wgmma_fence();
        multiply_rows<Element, TileQ>(dk, fragments, s.q[stage]);
        ptx::wgmma_commit_group();
        ptx::wgmma_wait_group<1>();
        arrive_warp(&s.dout_empty[stage]);
        ptx::wgmma_wait_group<0>();
        arrive_warp(&s.q_empty[stage]);
        place.advance();  // past a step of the other consumer
        place.advance();
    }

    __device__ __forceinline__ void differentiate(int tile, int num_steps) {
        int const key = tile * T::kTileN;
        ptx::mbarrier_try_wait_parity(&s.k_full, kv_place.parity());
        ptx::mbarrier_try_wait_parity(&s.v_full, kv_place.parity());
        for (int left = (num_steps + begins) / 2; left > 0; left--) step(key);
        begins ^= num_steps & 1;
        ptx::fence_registers(dk);
        ptx::fence_registers(dv);
        arrive_warp(&s.kv_empty);
        kv_place.advance();
    }

    // Adds to the gradients that this consumer is to write what the other one has of them. Each thread reads and writes
    // the same places, so that none is written before it has been read.
    __device__ __forceinline__ void exchange() {
        if (group == 1) give(dv);
        ptx::barrier_sync(kTurnBarrier, 256);
        if (group == 0) {
            take(dv);
            give(dk);
        }
        ptx::barrier_sync(kTurnBarrier, 256);
        if (group == 1) take(dk);
    }
    __device__ __forceinline__ void give(float const (&values)[T::kHeadDim / 2]) {
        uint32_t const address = ptx::shared_address(s.exchanged) + threadIdx.x % 128 * sizeof(float4);
#pragma unroll
        for (int i = 0; i < T::kHeadDim / 2; i += 4) {
            ptx::store_shared(address + i * 128 * sizeof(float), values[i], values[i + 1], values[i + 2], values[i + 3]);
        }
    }
    __device__ __forceinline__ void take(float (&values)[T::kHeadDim / 2]) {
        auto const* const given = reinterpret_cast<float4 const*>(s.exchanged) + threadIdx.x % 128;
#pragma unroll
        for (int i = 0; i < T::kHeadDim / 2; i += 4) {
            float4 const x = given[i * 32];
            values[i] += x.x, values[i + 1] += x.y, values[i + 2] += x.z, values[i + 3] += x.w;
        }
    }

    // Gradients of keys or values, or what was computed of them so far.
    __device__ __forceinline__ void write(float (&sums)[T::kHeadDim / 2], void* tensor, float factor, Item const& item,
                                          KeyRange const& keys) {
        auto& halves = reinterpret_cast<float(&)[2][T::kHeadDim / 4]>(sums);
        if (!exchange_with_items<T>(p, item, group, halves[0], halves[1])) return;
        store_rows<T, T::kHeadDim>(sums, tensor, p.out_mode, keys, p.num_kv_heads, item.kv_head, factor);
        tell_written(p, item.tile, group);
    }

    __device__ __forceinline__ void run() {
        while (true) {
            Item const next = next_item(s, item_place);
            if (next.tile < 0) break;
#pragma unroll
            for (int i = 0; i < T::kHeadDim / 2; i++) dk[i] = dv[i] = 0;
            if (next.steps > 0) {
                differentiate(next.tile, __shfl_sync(~0u, next.num_steps(), 0));
                exchange();
            }
            Item const item = item_in(s, item_place);
            KeyRange const keys = keys_in(s, item_place, 0);
            leave_item(s, item_place);
            if (group == 0) {
                write(dv, p.dv, 1, item, keys);
            } else {
                write(dk, p.dk, p.scale, item, keys);
            }
        }
    }
};

}  // namespace magi::backward
