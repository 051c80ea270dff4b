// SPDX-License-Identifier: Apache-2.0
// A warpgroup that computes.
#pragma once

#include "../ptx/barrier.cuh"
#include "../ptx/cp_async_bulk.cuh"
#include "../ptx/mbarrier.cuh"
#include "../ptx/wgmma.cuh"
#include "../ring.cuh"
#include "epilogue.cuh"
#include "schedule.cuh"
#include "softmax.cuh"
#include "traits.cuh"

namespace magi::forward {

constexpr uint32_t kFirstTurn = 1;  // named barriers, one for each consumer; 0 is __syncthreads()

template <typename T>
struct Consumer {
    using Element = typename T::Element;
    Params const& p;
    Shared<T>& s;
    int const group;  // which consumer
    RingPlace<T::kStages> k_place;  // values are one tile behind
    RingPlace<2> item_place;
    float out[T::kHeadDimV / 2];
    uint32_t probabilities[T::kTileN / 16][4];

    __device__ __forceinline__ Consumer(Params const& p, Shared<T>& s, int group) : p(p), s(s), group(group) {}

    // What the warp has read by products must have been waited for.
    __device__ __forceinline__ void release(uint64_t* empty) { ptx::mbarrier_arrive_warp(empty); }

    __device__ __forceinline__ void wait_for_turn() { ptx::barrier_sync(kFirstTurn + group, 256); }
    __device__ __forceinline__ void give_turn() {
        ptx::barrier_arrive(kFirstTurn + (group + 1 == T::kConsumers ? 0 : group + 1), 256);
    }

    // Starts scores = q k^T, for the first N keys of a tile.
    template <int N>
    __device__ __forceinline__ void multiply_keys(float (&scores)[N / 2], int stage) {
        uint64_t const q = T::TileQ::k_major(ptx::shared_address(s.q[group]));
        uint64_t const k = T::TileK::k_major(ptx::shared_address(s.k[stage]));
#pragma unroll
        for (int column = 0; column < T::kHeadDim; column += 16) {
            ptx::Wgmma<N>::template ss<Element, 0, 0>(scores, q + T::TileQ::from(0, column),
                                                      k + T::TileK::from(0, column), column > 0);
        }
        ptx::wgmma_commit_group();
    }

    // Starts out += probabilities v, for the first N keys of a tile.
    template <int N>
    __device__ __forceinline__ void multiply_values(int stage) {
        uint64_t const v = T::TileV::mn_major(ptx::shared_address(s.v[stage]));
#pragma unroll
        for (int row = 0; row < N; row += 16) {
            ptx::Wgmma<T::kHeadDimV>::template rs<Element, 1>(out, probabilities[row / 16], v + T::TileV::from(row, 0),
                                                              true);
        }
        ptx::wgmma_commit_group();
    }

    __device__ __forceinline__ void scale_out(float const (&factor)[2], bool needed) {
        // A loop, since after a branch the compiler would no longer know that all threads are at the same place.
#pragma unroll 1
        for (int once = needed; once > 0; once--) {
#pragma unroll
            for (int i = 0; i < T::kHeadDimV / 2; i++) out[i] *= factor[i / 2 % 2];
        }
    }

    // Scores of the first N keys of the next tile while the last one's probabilities are multiplied, and `make_mask`
    // sets their bits.
    template <bool Masked, int N, typename MakeMask>
    __device__ __forceinline__ void step(Softmax<T>& softmax, MakeMask const& make_mask) {
        float scores[N / 2];
        uint32_t bits[2][2];
        float shrink[2];
        int const k_stage = k_place.stage(), v_stage = k_place.before().stage();
        ptx::mbarrier_try_wait_parity(&s.k_full[k_stage], k_place.parity());
        wait_for_turn();
        ptx::wgmma_fence();
        multiply_keys<N>(scores, k_stage);
        ptx::mbarrier_try_wait_parity(&s.v_full[v_stage], k_place.before().parity());
        ptx::wgmma_fence();
        multiply_values<T::kTileN>(v_stage);
        give_turn();
        if constexpr (Masked) make_mask(bits);
        ptx::wgmma_wait_group<1>();
        ptx::fence_registers(scores);
        release(&s.k_empty[k_stage]);
        softmax.template step<Masked>(scores, bits, shrink, p.tolerance);
        bool const shrinks = !T::kShrinksRarely || __any_sync(~0u, shrink[0] != 1 || shrink[1] != 1);
        ptx::wgmma_wait_group<0>();
        ptx::fence_registers(out);
        release(&s.v_empty[v_stage]);
        k_place.advance();
        scale_out(shrink, shrinks);
        to_fragments<Element>(scores, probabilities);
    }

    template <typename MakeMask>
    __device__ __forceinline__ void first_step(Softmax<T>& softmax, MakeMask const& make_mask) {
        float scores[T::kTileN / 2];
        uint32_t bits[2][2];
        float shrink[2];
        ptx::mbarrier_try_wait_parity(&s.k_full[k_place.stage()], k_place.parity());
        ptx::wgmma_fence();
        multiply_keys<T::kTileN>(scores, k_place.stage());
        make_mask(bits);
        ptx::wgmma_wait_group<0>();
        ptx::fence_registers(scores);
        release(&s.k_empty[k_place.stage()]);
        k_place.advance();
        softmax.template step<true>(scores, bits, shrink, p.tolerance);
        to_fragments<Element>(scores, probabilities);
    }

    // The product with the last N values.
    template <int N>
    __device__ __forceinline__ void last_product() {
        ptx::mbarrier_try_wait_parity(&s.v_full[k_place.before().stage()], k_place.before().parity());
        ptx::wgmma_fence();
        multiply_values<N>(k_place.before().stage());
        ptx::wgmma_wait_group<0>();
        ptx::fence_registers(out);
        release(&s.v_empty[k_place.before().stage()]);
    }

    __device__ __forceinline__ void attend(Item const& item, Softmax<T>& softmax) {
        int left = item.num_tiles - item.num_half;
        {
            int const token[2] = {token_of(item, first_row()), token_of(item, first_row() + 8)};
            BoxCursor<T::kBoxN> cursor(p, item);
            auto const make_mask = [&](uint32_t (&bits)[2][2]) { mask_of_tile(p, cursor, token, bits); };
            first_step(softmax, make_mask);
            int const num_plain = left - max(item.num_masked, 1);
#pragma unroll 1
            while (--left > num_plain) step<true, T::kTileN>(softmax, make_mask);
        }
#pragma unroll 1
        for (; left > 0; left--) step<false, T::kTileN>(softmax, [](uint32_t (&)[2][2]) {});
        // Loops, not branches, after which the compiler would no longer know that all threads are at the same place of
        // the rings, and compute addresses of operands for each.
#pragma unroll 1
        for (int i = 0; i < item.num_half; i++) {
            step<true, T::kHalfN>(softmax, [&](uint32_t (&bits)[2][2]) {
                int const token[2] = {token_of(item, first_row()), token_of(item, first_row() + 8)};
                int4 const run = __ldg(p.runs + item.last_run);
                mask_of_box<T::kBoxN>(p, run, run.x, token, bits[0]);
                bits[1][0] = bits[1][1] = 0;
            });
        }
        release(&s.q_empty[group]);
#pragma unroll 1
        for (int i = 0; i < item.num_half; i++) last_product<T::kHalfN>();
#pragma unroll 1
        for (int i = item.num_half; i < 1; i++) last_product<T::kTileN>();
    }

    // The row of the consumer's share that is the thread's first; the other is 8 below.
    __device__ __forceinline__ int first_row() const { return accumulator_row(threadIdx.x % 128, 0); }

    // The token of a row, and one beyond the share's for a row that counts for nothing.
    __device__ __forceinline__ int token_of(Item const& item, int row) const {
        return (item.tile * T::kConsumers + group) * p.share_q + row / p.pack;
    }

    __device__ __forceinline__ OutputRow output_row(Item const& item, int row) const {
        int const within = row / p.pack;
        int const token = (item.tile * T::kConsumers + group) * p.share_q + within;
        int const head = item.pack * p.pack + row - within * p.pack;
        bool const inside = within < p.share_q && token < p.results.num_q;
        return {item.first_row + token, head, inside};
    }

    __device__ __forceinline__ void run() {
        // The first consumer has the first turn.
        if (group == T::kConsumers - 1) give_turn();
        while (true) {
            ptx::mbarrier_try_wait_parity(&s.item_full[item_place.stage()], item_place.parity());
            Item const& item = s.item[item_place.stage()];  // registers are scarce
            if (item.tile < 0) break;
            Softmax<T> softmax(p.scoring);
#pragma unroll
            for (int i = 0; i < T::kHeadDimV / 2; i++) out[i] = 0;
            ptx::mbarrier_try_wait_parity(&s.q_full[group], item_place.stage());  // queries' phases are items
            if (item.num_tiles > 0) {
                attend(item, softmax);
            } else {
                release(&s.q_empty[group]);
            }
            OutputRow const rows[2] = {output_row(item, first_row()), output_row(item, first_row() + 8)};
            release(&s.item_empty[item_place.stage()]);
            if (T::kStagesOut && p.results.stages_out()) {
                if (p.results.max_logits != nullptr) store_max_logits<T>(p.results, softmax, rows);
                ptx::mbarrier_try_wait_parity(&s.out_empty[group], item_place.stage() ^ 1);
                stage<T>(p.results, softmax, out, rows, s.out[group]);
                ptx::fence_proxy_async_shared();
                release(&s.out_full[group]);
            } else {
                store<T>(p.results, softmax, out, rows);
            }
            item_place.advance();
        }
    }
};

}  // namespace magi::forward
