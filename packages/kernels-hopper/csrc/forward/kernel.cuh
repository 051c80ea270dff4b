// SPDX-License-Identifier: Apache-2.0
// The forward kernel. Each block takes tiles of queries from a common list until none is left. Its first warpgroup has
// the copy engine bring queries, keys and values; the others, the consumers, each compute 64 rows of the tile: scores by
// one product, their softmax, and a second product with the values. A consumer starts the scores of the next tile of
// keys before it multiplies the present probabilities, and consumers take turns in giving the tensor cores work, so that
// the softmax of one runs while the other's products do (as in FlashAttention-3, Shah et al., 2024).
#pragma once

#include "../ptx/barrier.cuh"
#include "../ptx/cp_async_bulk_tensor.cuh"
#include "../ptx/mbarrier.cuh"
#include "../ptx/wgmma.cuh"
#include "../ring.cuh"
#include "epilogue.cuh"
#include "schedule.cuh"
#include "softmax.cuh"
#include "traits.cuh"

namespace magi::forward {

using ptx::CacheHint;

constexpr uint32_t kFirstTurn = 1;  // named barriers, one for each consumer; 0 is __syncthreads()

template <typename T>
__device__ __forceinline__ void init_barriers(Shared<T>& s) {
    constexpr uint32_t kArrivals = 4 * T::kConsumers * ptx::kArrivalsOfWarp;  // of consumers
    ptx::mbarrier_init(&s.q_full, 1);
    ptx::mbarrier_init(&s.q_empty, kArrivals);
    for (int i = 0; i < T::kStages; i++) {
        ptx::mbarrier_init(&s.k_full[i], 1);
        ptx::mbarrier_init(&s.k_empty[i], kArrivals);
        ptx::mbarrier_init(&s.v_full[i], 1);
        ptx::mbarrier_init(&s.v_empty[i], kArrivals);
    }
    for (int i = 0; i < 2; i++) {
        ptx::mbarrier_init(&s.item_full[i], 1);
        ptx::mbarrier_init(&s.item_empty[i], kArrivals);
    }
    ptx::fence_mbarrier_init();
}

// ---- The producer: one thread ----

template <typename T>
struct Producer {
    Params const& p;
    Shared<T>& s;
    RingPlace<T::kStages> k_place, v_place;
    RingPlace<2> item_place;
    RingPlace<1> q_place;

    template <typename Tile>
    __device__ __forceinline__ void load_boxes(uint8_t* target, CUtensorMap const* map, uint64_t* full,
                                               int const (&boxes)[2], int kv_head) {
        ptx::mbarrier_arrive_expect_tx(full, Tile::kBytes);
#pragma unroll
        for (int panel = 0; panel < Tile::kPanels; panel++) {
#pragma unroll
            for (int b = 0; b < 2; b++) {
                ptx::cp_async_bulk_tensor_3d(
                    target + panel * Tile::kPanelBytes + b * T::kBoxN * Tile::kSwizzleBytes, map, full,
                    panel * Tile::kPanelColumns, kv_head, boxes[b], CacheHint::kEvictLast);
            }
        }
    }

    __device__ __forceinline__ void load_q(Item const& item) {
        ptx::mbarrier_try_wait_parity(&s.q_empty, q_place.parity() ^ 1);
        ptx::mbarrier_arrive_expect_tx(&s.q_full, p.pack * p.tile_q * T::kHeadDim * kBytesPerElement);
#pragma unroll
        for (int panel = 0; panel < T::TileQ::kPanels; panel++) {
            ptx::cp_async_bulk_tensor_3d(s.q + panel * T::TileQ::kPanelBytes, &p.q, &s.q_full,
                                         panel * T::TileQ::kPanelColumns, item.pack * p.pack, item.tile * p.tile_q,
                                         CacheHint::kEvictFirst);
        }
        q_place.advance();
    }

    __device__ __forceinline__ void load_k(int const (&boxes)[2], int kv_head) {
        ptx::mbarrier_try_wait_parity(&s.k_empty[k_place.stage()], k_place.parity() ^ 1);
        load_boxes<typename T::TileK>(s.k[k_place.stage()], &p.k, &s.k_full[k_place.stage()], boxes, kv_head);
        k_place.advance();
    }

    __device__ __forceinline__ void load_v(int const (&boxes)[2], int kv_head) {
        ptx::mbarrier_try_wait_parity(&s.v_empty[v_place.stage()], v_place.parity() ^ 1);
        load_boxes<typename T::TileV>(s.v[v_place.stage()], &p.v, &s.v_full[v_place.stage()], boxes, kv_head);
        v_place.advance();
    }

    __device__ __forceinline__ void announce(Item const& item) {
        ptx::mbarrier_try_wait_parity(&s.item_empty[item_place.stage()], item_place.parity() ^ 1);
        int* const slot = s.item[item_place.stage()];
        slot[0] = item.tile;
        slot[1] = item.pack;
        slot[2] = item.first_run;
        slot[3] = item.num_tiles;
        slot[4] = item.num_masked;
        ptx::mbarrier_arrive(&s.item_full[item_place.stage()]);
        item_place.advance();
    }

    // Keys are one tile ahead of values, as consumers want them.
    __device__ __forceinline__ void load(Item const& item) {
        if (item.num_tiles == 0) return;
        int const kv_head = item.pack / p.packs_per_kv_head;
        BoxCursor<T::kBoxN> cursor(p, item);
        int boxes[2] = {cursor.next(), cursor.next()};
        load_k(boxes, kv_head);
        load_q(item);
#pragma unroll 1
        for (int i = 1; i < item.num_tiles; i++) {
            int const next[2] = {cursor.next(), cursor.next()};
            load_k(next, kv_head);
            load_v(boxes, kv_head);
            boxes[0] = next[0];
            boxes[1] = next[1];
        }
        load_v(boxes, kv_head);
    }

    __device__ __forceinline__ void run() {
        int const num_items = p.num_tiles * p.num_packs;
        int number = blockIdx.x;
        while (number < num_items) {
            int const next = gridDim.x + atomicAdd(p.counters, 1);
            Item const item = item_at(p, number);
            announce(item);
            load(item);
            number = next;
        }
        announce({-1, 0, 0, 0, 0});
        // The block that is the last to finish leaves both counters as it found them.
        __threadfence();
        if (atomicInc(p.counters + 1, gridDim.x - 1) == gridDim.x - 1) atomicExch(p.counters, 0);
    }
};

// ---- The consumers: a warpgroup each ----

template <typename T>
struct Consumer {
    using Element = typename T::Element;
    Params const& p;
    Shared<T>& s;
    int const group;  // which consumer
    RingPlace<T::kStages> k_place, v_place;
    RingPlace<2> item_place;
    RingPlace<1> q_place;
    float scores[T::kTileN / 2];
    float out[T::kHeadDimV / 2];
    uint32_t probabilities[T::kTileN / 16][4];

    __device__ __forceinline__ Consumer(Params const& p, Shared<T>& s, int group) : p(p), s(s), group(group) {}

    // What the warp has read by products must have been waited for.
    __device__ __forceinline__ void release(uint64_t* empty) { ptx::mbarrier_arrive_warp(empty); }

    __device__ __forceinline__ void wait_for_turn() { ptx::barrier_sync(kFirstTurn + group, 256); }
    __device__ __forceinline__ void give_turn() {
        ptx::barrier_arrive(kFirstTurn + (group + 1 == T::kConsumers ? 0 : group + 1), 256);
    }

    // Starts scores = q k^T.
    __device__ __forceinline__ void multiply_keys() {
        uint64_t const q = T::TileQ::k_major(ptx::shared_address(s.q)) + group * T::TileQ::from(64, 0);
        uint64_t const k = T::TileK::k_major(ptx::shared_address(s.k[k_place.stage()]));
#pragma unroll
        for (int column = 0; column < T::kHeadDim; column += 16) {
            ptx::Wgmma<T::kTileN>::template ss<Element, 0, 0>(scores, q + T::TileQ::from(0, column),
                                                              k + T::TileK::from(0, column), column > 0);
        }
        ptx::wgmma_commit_group();
    }

    // Starts out += probabilities v.
    __device__ __forceinline__ void multiply_values() {
        uint64_t const v = T::TileV::mn_major(ptx::shared_address(s.v[v_place.stage()]));
#pragma unroll
        for (int row = 0; row < T::kTileN; row += 16) {
            ptx::Wgmma<T::kHeadDimV>::template rs<Element, 1>(out, probabilities[row / 16], v + T::TileV::from(row, 0),
                                                              true);
        }
        ptx::wgmma_commit_group();
    }

    __device__ __forceinline__ void scale_out(float const (&factor)[2]) {
#pragma unroll
        for (int i = 0; i < T::kHeadDimV / 2; i++) out[i] *= factor[i / 2 % 2];
    }

    // Scores of the next tile while the last one's probabilities are multiplied.
    template <bool Masked>
    __device__ __forceinline__ void step(Softmax<T>& softmax, BoxCursor<T::kBoxN>& cursor, int const (&token)[2]) {
        uint32_t bits[2][2];
        float shrink[2];
        ptx::mbarrier_try_wait_parity(&s.k_full[k_place.stage()], k_place.parity());
        wait_for_turn();
        ptx::wgmma_fence();
        multiply_keys();
        ptx::mbarrier_try_wait_parity(&s.v_full[v_place.stage()], v_place.parity());
        ptx::wgmma_fence();
        multiply_values();
        give_turn();
        if constexpr (Masked) mask_of_tile(p, cursor, token, bits);
        ptx::wgmma_wait_group<1>();
        ptx::fence_registers(scores);
        release(&s.k_empty[k_place.stage()]);
        k_place.advance();
        softmax.template step<Masked>(scores, bits, shrink);
        ptx::wgmma_wait_group<0>();
        ptx::fence_registers(out);
        release(&s.v_empty[v_place.stage()]);
        v_place.advance();
        scale_out(shrink);
        to_fragments<Element>(scores, probabilities);
    }

    __device__ __forceinline__ void attend(Item const& item, Softmax<T>& softmax) {
        int const token[2] = {token_of(item, first_row()), token_of(item, first_row() + 8)};
        BoxCursor<T::kBoxN> cursor(p, item);
        uint32_t bits[2][2];
        float shrink[2];
        ptx::mbarrier_try_wait_parity(&s.q_full, q_place.parity());
        ptx::mbarrier_try_wait_parity(&s.k_full[k_place.stage()], k_place.parity());
        ptx::wgmma_fence();
        multiply_keys();
        mask_of_tile(p, cursor, token, bits);
        ptx::wgmma_wait_group<0>();
        ptx::fence_registers(scores);
        release(&s.k_empty[k_place.stage()]);
        k_place.advance();
        softmax.template step<true>(scores, bits, shrink);
        to_fragments<Element>(scores, probabilities);

#pragma unroll 1
        for (int i = 1; i < item.num_masked; i++) step<true>(softmax, cursor, token);
#pragma unroll 1
        for (int i = max(item.num_masked, 1); i < item.num_tiles; i++) step<false>(softmax, cursor, token);
        release(&s.q_empty);
        q_place.advance();

        ptx::mbarrier_try_wait_parity(&s.v_full[v_place.stage()], v_place.parity());
        ptx::wgmma_fence();
        multiply_values();
        ptx::wgmma_wait_group<0>();
        ptx::fence_registers(out);
        release(&s.v_empty[v_place.stage()]);
        v_place.advance();
    }

    __device__ __forceinline__ Item next_item() {
        ptx::mbarrier_try_wait_parity(&s.item_full[item_place.stage()], item_place.parity());
        int const* const slot = s.item[item_place.stage()];
        Item const item = {slot[0], slot[1], slot[2], slot[3], slot[4]};
        release(&s.item_empty[item_place.stage()]);
        item_place.advance();
        return item;
    }

    // The row of the tile that is the thread's first; the other is 8 below.
    __device__ __forceinline__ int first_row() const { return 64 * group + accumulator_row(threadIdx.x % 128, 0); }

    // The token of a row, and one beyond the tile's for a row that counts for nothing.
    __device__ __forceinline__ int token_of(Item const& item, int row) const {
        return item.tile * p.tile_q + row / p.pack;
    }

    __device__ __forceinline__ OutputRow output_row(Item const& item, int row) const {
        int const within = row / p.pack;
        int const token = item.tile * p.tile_q + within;
        int const head = item.pack * p.pack + row - within * p.pack;
        return {token, head, within < p.tile_q && token < p.results.num_q};
    }

    __device__ __forceinline__ void run() {
        // The first consumer has the first turn.
        if (group == T::kConsumers - 1) give_turn();
        while (true) {
            Item const item = next_item();
            if (item.tile < 0) break;
            Softmax<T> softmax(p.scoring);
#pragma unroll
            for (int i = 0; i < T::kHeadDimV / 2; i++) out[i] = 0;
            if (item.num_tiles > 0) attend(item, softmax);
            OutputRow const rows[2] = {output_row(item, first_row()), output_row(item, first_row() + 8)};
            store<T>(p.results, softmax, out, rows);
        }
    }
};

template <typename T>
__device__ __forceinline__ void forward(Params const& p) {
    extern __shared__ uint8_t memory[];
    auto& s = *reinterpret_cast<Shared<T>*>((reinterpret_cast<uintptr_t>(memory) + 1023) & ~uintptr_t{1023});
    int const warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
    if (threadIdx.x == 0) init_barriers(s);
    __syncthreads();
    if (warpgroup == 0) {
        ptx::setmaxnreg_dec<T::kProducerRegisters>();
        if (__shfl_sync(~0u, threadIdx.x / 32, 0) == 0 && ptx::elect_sync()) {
            ptx::prefetch_tensormap(&p.q);
            ptx::prefetch_tensormap(&p.k);
            ptx::prefetch_tensormap(&p.v);
            Producer<T>{p, s}.run();
        }
    } else {
        ptx::setmaxnreg_inc<T::kConsumerRegisters>();
        Consumer<T>(p, s, warpgroup - 1).run();
    }
}

}  // namespace magi::forward
