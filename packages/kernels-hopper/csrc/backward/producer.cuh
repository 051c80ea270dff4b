// SPDX-License-Identifier: Apache-2.0
// The threads that move data: one has the copy engine bring keys, queries and all that goes with them; one for each
// consumer has it add gradients of queries to their sums.
#pragma once

#include "../ptx/cp_async_bulk.cuh"
#include "../ptx/cp_async_bulk_tensor.cuh"
#include "../ring.cuh"
#include "schedule.cuh"
#include "finisher.cuh"
#include "shared.cuh"
#include "sums.cuh"

namespace magi::backward {

using ptx::CacheHint;

template <typename T>
struct Loader {
    Params const& p;
    Shared<T>& s;
    RingPlace<T::kStages> place;
    RingPlace<2> item_place;
    RingPlace<1> kv_place;

    template <typename Tile>
    __device__ __forceinline__ void load(uint8_t* target, CUtensorMap const* map, uint64_t* full, int head, int token,
                                         CacheHint hint) {
#pragma unroll
        for (int panel = 0; panel < Tile::kPanels; panel++) {
            ptx::cp_async_bulk_tensor_3d(target + panel * Tile::kPanelBytes, map, full, panel * Tile::kPanelColumns,
                                         head, token, hint);
        }
    }

    __device__ __forceinline__ void load_keys(Item const& item) {
        int const first_key = __ldg(&p.keys[item.tile].x);
        ptx::mbarrier_try_wait_parity(&s.kv_empty, kv_place.parity() ^ 1);
        ptx::mbarrier_arrive_expect_tx(&s.k_full, T::TileK::kBytes);
        load<typename T::TileK>(s.k, &p.k, &s.k_full, item.kv_head, first_key, CacheHint::kEvictFirst);
        ptx::mbarrier_arrive_expect_tx(&s.v_full, T::TileV::kBytes);
        load<typename T::TileV>(s.v, &p.v, &s.v_full, item.kv_head, first_key, CacheHint::kEvictFirst);
        kv_place.advance();
    }

    __device__ __forceinline__ void load_queries(Walk const& walk) {
        int const stage = place.stage(), token = walk.tile * (T::kTileM >> p.log2_pack);
        constexpr uint32_t kTermBytes = sizeof(s.row_terms[0]);
        ptx::mbarrier_try_wait_parity(&s.q_empty[stage], place.parity() ^ 1);
        int const tile = walk.pack * p.num_tiles_q + walk.tile;
        s.step[stage] = make_int4(token, walk.run.z, walk.run.w, tile);
        s.rank[stage] = walk.rank();
        ptx::mbarrier_arrive_expect_tx(&s.q_full[stage], T::TileQ::kBytes + kTermBytes);
        load<typename T::TileQ>(s.q[stage], &p.q, &s.q_full[stage], walk.pack << p.log2_pack, token,
                                CacheHint::kEvictNormal);
        ptx::cp_async_bulk_load(s.row_terms[stage], p.row_terms + static_cast<int64_t>(tile) * 2 * T::kTerms, kTermBytes,
                                &s.q_full[stage]);
    }

    __device__ __forceinline__ void load_gradients(Walk const& walk) {
        int const stage = place.stage();
        ptx::mbarrier_try_wait_parity(&s.dout_empty[stage], place.parity() ^ 1);
        ptx::mbarrier_arrive_expect_tx(&s.dout_full[stage], T::TileDout::kBytes);
        load<typename T::TileDout>(s.dout[stage], &p.dout, &s.dout_full[stage], walk.pack << p.log2_pack,
                                walk.tile * (T::kTileM >> p.log2_pack), CacheHint::kEvictNormal);
    }

    __device__ __forceinline__ void announce(Item const& item) {
        ptx::mbarrier_try_wait_parity(&s.item_empty[item_place.stage()], item_place.parity() ^ 1);
        int* const slot = s.item[item_place.stage()];
        slot[0] = item.tile;
        slot[1] = item.kv_head;
        slot[2] = item.steps;
        slot[3] = item.first_pack << 16 | item.packs;
        s.keys[item_place.stage()] = __ldg(p.keys + max(item.tile, 0));
        ptx::mbarrier_arrive(&s.item_full[item_place.stage()]);
        item_place.advance();
    }

    __device__ __forceinline__ void run() {
        // An item is taken when all of the one before is loaded, and not earlier: others may wait for it, and a block that is
        // done sooner could have taken it. As blocks take none before they run, those that wait never wait for such a block.
        while (true) {
            int const number = atomicAdd(p.counters, 1);
            if (number >= p.num_items) break;
            Item const item = item_at(p, number);
            announce(item);
            if (item.steps == 0) continue;
            Walk walk(p, item);
            load_queries(walk);
            load_keys(item);
            load_gradients(walk);
            place.advance();
            for (int left = item.num_steps() - 1; left > 0; left--) {
                walk.advance();
                load_queries(walk);
                load_gradients(walk);
                place.advance();
            }
        }
        announce({-1, 0, 0, 0, 0});
    }
};

// Adds what one consumer has computed of the gradients of queries to their sums.
template <typename T>
struct Reducer {
    Params const& p;
    Shared<T>& s;
    int const group;  // which consumer

    __device__ __forceinline__ int part_of(Target const& target) const {
        return target.tile * T::kDqParts + (T::kDqAlternates ? 0 : group);
    }

    // What was added last, if that has not been told yet.
    struct Addition {
        Target target;
        bool written;
    };

    // Tells that it is there. Up to `Pending` additions came after it.
    template <int Pending>
    __device__ __forceinline__ void tell(Addition& added) const {
        if (added.target.tile < 0) return;
        ptx::cp_async_bulk_wait_group<Pending>();
        ptx::fence_proxy_async_global();
        count_addition<T>(p, added.target.tile, part_of(added.target), added.written);
        added.target.tile = -1;
    }

    // To tell takes about as long as to add, and is done meanwhile, or where there is nothing else to do. Others may wait
    // for it, so it is never left undone while this thread waits.
    __device__ __forceinline__ void run() {
        RingPlace<1> place;
        Addition before = {{-1, 0}, false};
        while (true) {
            if (!ptx::mbarrier_test_wait_parity(&s.dq_full[group], place.parity())) tell<0>(before);
            ptx::mbarrier_try_wait_parity(&s.dq_full[group], place.parity());
            Target const target = s.dq_target[group];
            if (target.tile < 0) break;
            int const part = part_of(target);
            float* const sums = p.dq_sums + static_cast<int64_t>(part) * T::kDqFloats;
            Turn const turn = turn_of(p, part, target.rank);
            if (turn == Turn::kWrite) {
                ptx::cp_async_bulk_store(sums, s.dq[group], sizeof(s.dq[group]));
            } else {
                if (turn == Turn::kLater) {
                    tell<0>(before);
                    wait_for_turn(p, part, target.rank);
                }
                ptx::fence_proxy_async_global();
                ptx::cp_reduce_async_bulk_add(sums, s.dq[group], sizeof(s.dq[group]));
            }
            ptx::cp_async_bulk_commit_group();
            tell<1>(before);
            before = {target, turn == Turn::kWrite};
            ptx::cp_async_bulk_wait_group_read<0>();
            ptx::mbarrier_arrive(&s.dq_empty[group]);
            place.advance();
            if (p.ranks != nullptr) tell<0>(before);
        }
        tell<0>(before);
    }
};

}  // namespace magi::backward
