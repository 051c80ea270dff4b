// SPDX-License-Identifier: Apache-2.0
// Consumers of heads of more than 128, for which two tensors' gradients don't fit into a consumer's registers: of a tile
// of 64 keys, one computes probabilities and the gradients of values, the other the gradients of scores and of keys.
#pragma once

#include "consumer.cuh"

namespace magi::backward {

template <typename T>
struct WideConsumer {
    using Element = typename T::Element;
    using TileK = typename T::TileK;
    using TileV = typename T::TileV;
    using TileQ = typename T::TileQ;
    using TileDout = typename T::TileDout;

    Params const& p;
    Shared<T>& s;
    int const group;  // 0: values, 1: keys
    RingPlace<T::kStages> place;
    RingPlace<2> item_place, ds_place;
    RingPlace<1> kv_place;
    float sums[T::kHeadDim / 2];  // gradients of keys or, in as many as there are, of values

    __device__ __forceinline__ WideConsumer(Params const& p, Shared<T>& s, int group)
        : p(p), s(s), group(group) {}

    __device__ __forceinline__ void pass_on(Dq<T> const& dq, int pass) {
        if constexpr (T::kDqShared) {
            hand_over_dq(s, dq, s.ds_target[ds_place.before().stage()], ds_place.before(), group);
        } else {
            add_dq<T>(p, s, dq, s.ds_target[ds_place.before().stage()], group, pass);
        }
    }

    // The gradients of queries of the step before, while `sums` grows by this step's, with the rows of a tile.
    template <typename Tile>
    __device__ __forceinline__ void finish(Fragments<T> const& fragments, void const* rows, bool first) {
        RingPlace<2> const before = ds_place.before();
        if (!first) ptx::mbarrier_try_wait_parity(&s.ds_full[before.stage()], before.parity());
#pragma unroll
        for (int pass = 0; pass < T::kDqPasses; pass++) {
            Dq<T> dq;
            ptx::wgmma_fence();
            multiply_scores<T>(dq, s.ds[before.stage()], s.k, group, pass);
            ptx::wgmma_commit_group();
            if (pass == T::kDqPasses - 1) {
                multiply_rows<Element, Tile>(reinterpret_cast<float(&)[Tile::kColumns / 2]>(sums), fragments, rows);
                ptx::wgmma_commit_group();
                ptx::wgmma_wait_group<1>();
            } else {
                ptx::wgmma_wait_group<0>();
            }
            ptx::fence_registers(dq);
            if (!first) pass_on(dq, pass);
        }
        if (!first) arrive_warp(&s.ds_empty[before.stage()]);
    }

    // Probabilities, and gradients of values, of one tile of queries.
    __device__ __forceinline__ void step_of_values(int key, bool first) {
        Scores<T> scores;
        Fragments<T> fragments;
        int const stage = place.stage();
        ptx::mbarrier_try_wait_parity(&s.q_full[stage], place.parity());
        ptx::wgmma_fence();
        multiply_columns<Element, TileK, TileQ>(scores, s.k, 0, s.q[stage]);
        ptx::wgmma_commit_group();
        StepMask<T> const mask(p, s.step[stage], key);
        ptx::wgmma_wait_group<0>();
        ptx::fence_registers(scores);
        if (!first) arrive_warp(&s.dout_empty[place.before().stage()]);
        mask.apply(scores);
        to_probabilities<T>(p, scores, fragments, terms_of_thread<T>(s.row_terms[stage][0]));
        arrive_warp(&s.q_empty[stage]);

        // What the other consumer multiplies by, rounded like the probabilities.
        Fragments<T> factors;
        if constexpr (T::kSoftcap) to_fragments<Element>(scores, factors);
        ptx::mbarrier_try_wait_parity(&s.p_empty[ds_place.stage()], ds_place.parity() ^ 1);
#pragma unroll
        for (int i = 0; i < T::kTileM / 16; i++) {
            uint32_t const (&words)[4] = T::kSoftcap ? factors[i] : fragments[i];
            s.p[ds_place.stage()][i][threadIdx.x % 128] = make_uint4(words[0], words[1], words[2], words[3]);
        }
        arrive_warp(&s.p_full[ds_place.stage()]);
        ptx::mbarrier_try_wait_parity(&s.dout_full[stage], place.parity());
        finish<TileDout>(fragments, s.dout[stage], first);
    }

    // Gradients of scores and of keys.
    __device__ __forceinline__ void step_of_keys(bool first) {
        Scores<T> ds;
        Fragments<T> fragments;
        int const stage = place.stage();
        ptx::mbarrier_try_wait_parity(&s.dout_full[stage], place.parity());
        ptx::wgmma_fence();
        multiply_columns<Element, TileV, TileDout>(ds, s.v, 0, s.dout[stage]);
        ptx::wgmma_commit_group();
        ptx::mbarrier_try_wait_parity(&s.q_full[stage], place.parity());
        ptx::wgmma_wait_group<0>();
        ptx::fence_registers(ds);
        arrive_warp(&s.dout_empty[stage]);
        if (!first) arrive_warp(&s.q_empty[place.before().stage()]);
        ptx::mbarrier_try_wait_parity(&s.p_full[ds_place.stage()], ds_place.parity());
        float const* const delta = terms_of_thread<T>(s.row_terms[stage][1]);
#pragma unroll
        for (int i = 0; i < T::kTileM / 16; i++) {
            uint4 const words = s.p[ds_place.stage()][i][threadIdx.x % 128];
            uint32_t const factors[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float2 const of_rows = terms_of(delta, 2 * i + j / 2);
                float2 const factor = unpack(factors[j], Element{});
                int const e = 8 * i + 2 * j;
                fragments[i][j] = pack(factor.x * (ds[e] - of_rows.x), factor.y * (ds[e + 1] - of_rows.y), Element{});
            }
        }
        arrive_warp(&s.p_empty[ds_place.stage()]);
        ptx::mbarrier_try_wait_parity(&s.ds_empty[ds_place.stage()], ds_place.parity() ^ 1);
        store_scores<T>(s.ds[ds_place.stage()], fragments, 0);
        if (threadIdx.x % 128 == 0) s.ds_target[ds_place.stage()] = {s.step[stage].w, s.rank[stage]};
        ptx::fence_proxy_async_shared();
        arrive_warp(&s.ds_full[ds_place.stage()]);
        finish<TileQ>(fragments, s.q[stage], first);
    }

    __device__ __forceinline__ void differentiate(int tile, int num_steps) {
        int const key = tile * T::kTileN;
        ptx::mbarrier_try_wait_parity(&s.k_full, kv_place.parity());
        ptx::mbarrier_try_wait_parity(&s.v_full, kv_place.parity());
        for (int i = 0; i < num_steps; i++) {
            if (group == 0) {
                step_of_values(key, i == 0);
            } else {
                step_of_keys(i == 0);
            }
            place.advance();
            ds_place.advance();
        }

        RingPlace<2> const before = ds_place.before();
        ptx::mbarrier_try_wait_parity(&s.ds_full[before.stage()], before.parity());
#pragma unroll
        for (int pass = 0; pass < T::kDqPasses; pass++) {
            Dq<T> dq;
            ptx::wgmma_fence();
            multiply_scores<T>(dq, s.ds[before.stage()], s.k, group, pass);
            ptx::wgmma_commit_group();
            ptx::wgmma_wait_group<0>();
            ptx::fence_registers(dq);
            pass_on(dq, pass);
        }
        ptx::fence_registers(sums);
        arrive_warp(&s.ds_empty[before.stage()]);
        uint64_t* const empty = group == 0 ? s.dout_empty : s.q_empty;
        arrive_warp(&empty[place.before().stage()]);
        arrive_warp(&s.kv_empty);
        kv_place.advance();
    }

    __device__ __forceinline__ void run() {
        while (true) {
            Item const next = next_item(s, item_place);
            if (next.tile < 0) break;
#pragma unroll
            for (int i = 0; i < T::kHeadDim / 2; i++) sums[i] = 0;
            if (next.steps > 0) differentiate(next.tile, next.num_steps());
            Item const item = item_in(s, item_place);
            KeyRange const keys = keys_in(s, item_place, 0);
            leave_item(s, item_place);
            if (T::kHeadDimV < T::kHeadDim && group == 0) {
                auto const& dv = reinterpret_cast<float const(&)[T::kHeadDimV / 2]>(sums);
                store_rows<T, T::kHeadDimV>(dv, p.dv, p.out_mode, keys, p.num_kv_heads, item.kv_head, 1);
            } else {
                store_rows<T, T::kHeadDim>(sums, group == 0 ? p.dv : p.dk, p.out_mode, keys, p.num_kv_heads, item.kv_head,
                                           group == 0 ? 1 : p.scale);
            }
            tell_written(p, item.tile, group);
        }
        if constexpr (T::kDqShared) finish_dq(s, ds_place, group);
    }
};

}  // namespace magi::backward
