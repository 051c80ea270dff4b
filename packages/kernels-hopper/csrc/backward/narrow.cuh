// SPDX-License-Identifier: Apache-2.0
// Consumers of heads of at most 128: each has 64 keys of the tile, and their gradients and those of their values.
#pragma once

#include "consumer.cuh"

namespace magi::backward {

template <typename T>
struct NarrowConsumer {
    using Element = typename T::Element;
    using TileK = typename T::TileK;
    using TileQ = typename T::TileQ;

    Params const& p;
    Shared<T>& s;
    int const group;  // which consumer
    RingPlace<T::kStages> place;
    RingPlace<2> item_place, ds_place;
    RingPlace<1> kv_place;
    float dk[T::kHeadDim / 2], dv[T::kHeadDim / 2];

    __device__ __forceinline__ NarrowConsumer(Params const& p, Shared<T>& s, int group)
        : p(p), s(s), group(group) {}

    // Whether this consumer computes gradients of the queries of the step before.
    __device__ __forceinline__ bool computes_dq_before() const {
        return !T::kDqAlternates || ds_place.before().stage() == group;
    }

    // Does so, and starts other products after it, which are not waited for. If there was no step before, what is computed
    // in its place is not used.
    template <typename Start>
    __device__ __forceinline__ void add_dq_before(Start const& start_others, bool exists) {
        Dq<T> dq;
        RingPlace<2> const before = ds_place.before();
        if (exists) ptx::mbarrier_try_wait_parity(&s.ds_full[before.stage()], before.parity());
        ptx::wgmma_fence();
        multiply_scores<T>(dq, s.ds[before.stage()], s.k, T::kDqAlternates ? 0 : group);
        ptx::wgmma_commit_group();
        ptx::wgmma_fence();
        start_others();
        ptx::wgmma_commit_group();
        ptx::wgmma_wait_group<1>();
        ptx::fence_registers(dq);
        if (!exists) return;
        Target const target = s.ds_target[before.stage()];
        arrive_warp(&s.ds_empty[before.stage()]);
        hand_over_dq(s, dq, target, before, group);
    }

    // One tile of queries, and of the one before the gradients of queries.
    __device__ __forceinline__ void step(int key, bool first) {
        Scores<T> scores, ds;
        Fragments<T> p_fragments, ds_fragments;
        int const stage = place.stage();
        ptx::mbarrier_try_wait_parity(&s.q_full[stage], place.parity());
        ptx::wgmma_fence();
        multiply_columns<Element, TileK, TileQ>(scores, s.k, 64 * group, s.q[stage]);
        ptx::wgmma_commit_group();
        ptx::mbarrier_try_wait_parity(&s.dout_full[stage], place.parity());
        ptx::wgmma_fence();
        multiply_columns<Element, TileK, TileQ>(ds, s.v, 64 * group, s.dout[stage]);
        ptx::wgmma_commit_group();
        int4 const of_step = s.step[stage];
        StepMask<T> const mask(p, of_step, key);
        ptx::wgmma_wait_group<1>();
        ptx::fence_registers(scores);
        mask.apply(scores);
        to_probabilities<T>(p, scores, p_fragments, terms_of_thread<T>(s.row_terms[stage][0]));
        ptx::wgmma_fence();
        multiply_rows<Element, TileQ>(dv, p_fragments, s.dout[stage]);
        ptx::wgmma_commit_group();
        ptx::wgmma_wait_group<1>();
        ptx::fence_registers(ds);
        to_score_gradients<T>(scores, ds, ds_fragments, terms_of_thread<T>(s.row_terms[stage][1]));
        ptx::mbarrier_try_wait_parity(&s.ds_empty[ds_place.stage()], ds_place.parity() ^ 1);
        store_scores<T>(s.ds[ds_place.stage()], ds_fragments, 64 * group);
        if (threadIdx.x == 128) s.ds_target[ds_place.stage()] = {of_step.w, s.rank[stage]};
        ptx::fence_proxy_async_shared();
        arrive_warp(&s.ds_full[ds_place.stage()]);

        auto const multiply_queries = [&] { multiply_rows<Element, TileQ>(dk, ds_fragments, s.q[stage]); };
        if (!T::kDqAlternates || (!first && computes_dq_before())) {
            add_dq_before(multiply_queries, !first);
        } else {
            ptx::wgmma_fence();
            multiply_queries();
            ptx::wgmma_commit_group();
            ptx::wgmma_wait_group<1>();
        }
        arrive_warp(&s.dout_empty[stage]);
        ptx::wgmma_wait_group<0>();
        arrive_warp(&s.q_empty[stage]);
        place.advance();
        ds_place.advance();
    }

    __device__ __forceinline__ void differentiate(int tile, int num_steps) {
        int const key = tile * T::kTileN + 64 * group;
        ptx::mbarrier_try_wait_parity(&s.k_full, kv_place.parity());
        ptx::mbarrier_try_wait_parity(&s.v_full, kv_place.parity());
        for (int i = 0; i < num_steps; i++) step(key, i == 0);

        if (computes_dq_before()) add_dq_before([] {}, true);
        ptx::wgmma_wait_group<0>();
        ptx::fence_registers(dk);
        ptx::fence_registers(dv);
        arrive_warp(&s.kv_empty);
        kv_place.advance();
    }

    __device__ __forceinline__ void run() {
        while (true) {
            Item const next = next_item(s, item_place);
            if (next.tile < 0) break;
#pragma unroll
            for (int i = 0; i < T::kHeadDim / 2; i++) dk[i] = dv[i] = 0;
            if (next.steps > 0) differentiate(next.tile, next.num_steps());
            Item const item = item_in(s, item_place);
            KeyRange const keys = keys_in(s, item_place, 64 * group);
            leave_item(s, item_place);
            if (!exchange_with_items<T>(p, item, group, dk, dv)) continue;
            store_rows<T, T::kHeadDimV>(dv, p.dv, p.out_mode, keys, p.num_kv_heads, item.kv_head, 1);
            store_rows<T, T::kHeadDim>(dk, p.dk, p.out_mode, keys, p.num_kv_heads, item.kv_head, p.scale);
            tell_written(p, item.tile, group);
        }
        RingPlace<2> next = ds_place;
        if (T::kDqAlternates && next.stage() != group) next.advance();
        finish_dq(s, next, group);
    }
};

}  // namespace magi::backward
