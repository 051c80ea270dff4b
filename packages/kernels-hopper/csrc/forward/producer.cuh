// SPDX-License-Identifier: Apache-2.0
// What the warpgroup does that computes nothing, a thread of a warp for each job: loading queries, keys and values, having
// outputs written, and reading the tables of masks early.
#pragma once

#include "../ptx/cp_async_bulk.cuh"
#include "../ptx/cp_async_bulk_tensor.cuh"
#include "../ptx/global.cuh"
#include "../ptx/mbarrier.cuh"
#include "../ring.cuh"
#include "schedule.cuh"
#include "traits.cuh"

namespace magi::forward {

using ptx::CacheHint;

template <typename T>
__device__ __forceinline__ void init_barriers(Shared<T>& s, bool stages_out) {
    constexpr uint32_t kOfOne = 4 * ptx::kArrivalsOfWarp, kOfAll = T::kConsumers * kOfOne;  // arrivals of consumers
    for (int i = 0; i < T::kConsumers; i++) {
        ptx::mbarrier_init(&s.q_full[i], 1);
        ptx::mbarrier_init(&s.q_empty[i], kOfOne);
        ptx::mbarrier_init(&s.out_full[i], kOfOne);
        ptx::mbarrier_init(&s.out_empty[i], 1);
    }
    for (int i = 0; i < T::kStages; i++) {
        ptx::mbarrier_init(&s.k_full[i], 1);
        ptx::mbarrier_init(&s.k_empty[i], kOfAll);
        ptx::mbarrier_init(&s.v_full[i], 1);
        ptx::mbarrier_init(&s.v_empty[i], kOfAll);
    }
    for (int i = 0; i < 2; i++) {
        ptx::mbarrier_init(&s.item_full[i], 1);
        ptx::mbarrier_init(&s.item_empty[i], kOfAll + 1 + stages_out);  // who reads ahead, and who writes
    }
    ptx::fence_mbarrier_init();
}

// Takes items from the list, tells of them, and loads what they need.
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

    // To the L2 cache, some tiles of keys before consumers are done with the queries that are in shared memory.
    __device__ __forceinline__ void prefetch_q(Item const& item) {
#pragma unroll 1
        for (int group = 0; group < T::kConsumers; group++) {
#pragma unroll
            for (int panel = 0; panel < T::TileQ::kPanels; panel++) {
                ptx::cp_async_bulk_prefetch_tensor_3d(&p.q, panel * T::TileQ::kPanelColumns, item.pack * p.pack,
                                                      (item.tile * T::kConsumers + group) * p.share_q);
            }
        }
    }

    // A consumer's rows of queries, or of what has as many columns.
    __device__ __forceinline__ void load_rows(uint8_t* target, CUtensorMap const* map, uint64_t* full, Item const& item,
                                              int group) {
        ptx::mbarrier_arrive_expect_tx(full, p.pack * p.share_q * T::kHeadDim * kBytesPerElement);
#pragma unroll
        for (int panel = 0; panel < T::TileQ::kPanels; panel++) {
            ptx::cp_async_bulk_tensor_3d(target + panel * T::TileQ::kPanelBytes, map, full,
                                         panel * T::TileQ::kPanelColumns, item.pack * p.pack,
                                         (item.tile * T::kConsumers + group) * p.share_q, CacheHint::kEvictFirst);
        }
    }

    __device__ __forceinline__ void load_q(Item const& item) {
#pragma unroll 1
        for (int group = 0; group < T::kConsumers; group++) {
            ptx::mbarrier_try_wait_parity(&s.q_empty[group], q_place.parity() ^ 1);
            load_rows(s.q[group], &p.q, &s.q_full[group], item, group);
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
        s.item[item_place.stage()] = item;
        ptx::mbarrier_arrive(&s.item_full[item_place.stage()]);
        item_place.advance();
    }

    // Keys are one tile ahead of values, as consumers want them. What else comes with queries, `load_more` loads.
    template <typename LoadMore>
    __device__ __forceinline__ void load(Item const& item, LoadMore const& load_more) {
        int const kv_head = item.pack / p.packs_per_kv_head;
        BoxCursor<T::kBoxN> cursor(p, item);
        int boxes[2], next[2];
#pragma unroll 1
        for (int i = 0; i <= item.num_tiles; i++) {
            if (i < item.num_tiles) {
                next[0] = cursor.next();
                next[1] = cursor.next();
                load_k(next, kv_head);
            }
            if (i == 0) {
                load_q(item);
                load_more(item);
            } else {
                load_v(boxes, kv_head);
            }
            boxes[0] = next[0];
            boxes[1] = next[1];
        }
    }

    template <typename LoadMore>
    __device__ __forceinline__ void run(LoadMore const& load_more) {
        int const num_items = p.num_tiles * p.num_packs;
        int number = blockIdx.x;
        while (number < num_items) {
            Item const item = item_at(p, number);
            announce(item);
            prefetch_q(item);
            load(item, load_more);
            number = gridDim.x + atomicAdd(p.counters, 1);
        }
        announce({-1, 0, 0, 0, 0, 0, 0, 0});
        // The block that is the last to finish leaves both counters as it found them.
        __threadfence();
        if (atomicInc(p.counters + 1, gridDim.x - 1) == gridDim.x - 1) atomicExch(p.counters, 0);
    }
};

// Has the copy engine write what consumers leave in shared memory.
template <typename T>
struct Writer {
    Params const& p;
    Shared<T>& s;

    __device__ __forceinline__ void run() {
        RingPlace<2> item_place;
        RingPlace<1> out_place;
        while (true) {
            ptx::mbarrier_try_wait_parity(&s.item_full[item_place.stage()], item_place.parity());
            Item const item = s.item[item_place.stage()];
            ptx::mbarrier_arrive(&s.item_empty[item_place.stage()]);
            item_place.advance();
            if (item.tile < 0) break;
#pragma unroll 1
            for (int group = 0; group < T::kConsumers; group++) {
                ptx::mbarrier_try_wait_parity(&s.out_full[group], out_place.parity());
#pragma unroll
                for (int panel = 0; panel < T::TileOut::kPanels; panel++) {
                    ptx::cp_async_bulk_tensor_store_3d(&p.out, s.out[group] + panel * T::TileOut::kPanelBytes,
                                                       panel * T::TileOut::kPanelColumns, item.pack * p.pack,
                                                       (item.tile * T::kConsumers + group) * p.share_q);
                }
                ptx::cp_async_bulk_commit_group();
            }
            ptx::cp_async_bulk_wait_group_read<0>();
#pragma unroll 1
            for (int group = 0; group < T::kConsumers; group++) ptx::mbarrier_arrive(&s.out_empty[group]);
            out_place.advance();
        }
        ptx::cp_async_bulk_wait_group<0>();
    }
};

// Loads a run, and as much of its pieces as most masks have, into the L1 cache.
__device__ __forceinline__ int4 read_run(Params const& p, int number) {
    int4 const run = ptx::load_to_keep(p.runs + number);
    if (run.w > 0) {
        ptx::load_to_keep(p.pieces + 2 * run.z);
        ptx::load_to_keep(p.pieces + 2 * (run.z + run.w) - 1);
    }
    return run;
}

// Reads the tables of masks as soon as an item is known, so that consumers find them in the L1 cache.
template <typename T>
__device__ __forceinline__ void read_ahead(Params const& p, Shared<T>& s) {
    constexpr int kMostRuns = 64;
    RingPlace<2> item_place;
    while (true) {
        ptx::mbarrier_try_wait_parity(&s.item_full[item_place.stage()], item_place.parity());
        Item const item = s.item[item_place.stage()];
        ptx::mbarrier_arrive(&s.item_empty[item_place.stage()]);
        item_place.advance();
        if (item.tile < 0) break;
        int boxes = item.num_tiles == 0 ? 0 : 2 * max(item.num_masked, 1);
        for (int i = 0; i < kMostRuns && boxes > 0; i++) {
            int4 const run = read_run(p, item.first_run + i);
            boxes -= (run.y - run.x + T::kBoxN - 1) / T::kBoxN;
        }
        if (item.last_run >= 0) read_run(p, item.last_run);
    }
}

}  // namespace magi::forward
