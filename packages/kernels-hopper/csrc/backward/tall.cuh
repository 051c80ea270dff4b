// SPDX-License-Identifier: Apache-2.0
// Consumers for tiles of more than 64 rows of queries: each has 64 keys of the tile, and their gradients and those of
// their values. Gradients of queries are two steps late, so that they are there when probabilities are; on their way out
// they overlap with gradients of values, and the stores of gradients of scores with those of keys. Scores and gradients
// of probabilities take turns in the same registers, so that 80 rows fit; in between, probabilities are kept as they
// were rounded. Consumers take turns at scores and probabilities, so that one has products to do meanwhile.
#pragma once

#include "../ptx/ldmatrix.cuh"
#include "consumer.cuh"

namespace magi::backward {

// Of its values, how many fragments of 16 columns a consumer keeps in registers, as many as are left: the products read
// less shared memory, which is nearly as busy as the tensor cores.
template <typename T>
constexpr int kValueFragments = std::is_same_v<typename T::Element, __nv_bfloat16> && !T::kSoftcap ? 5 : 0;

// Whether consumers rest in steps in which none of their pairs counts. In the other kernels the thread that loads would
// lack registers, in every step.
template <typename T>
constexpr bool kRests = kValueFragments<T> > 0;

template <typename T>
struct TallConsumer {
    static_assert(T::kStages == 2);
    using Element = typename T::Element;
    using TileK = typename T::TileK;
    using TileQ = typename T::TileQ;

    Params const& p;
    Shared<T>& s;
    int const group;     // which consumer
    RingPlace<2> place;  // of tiles of queries, and of gradients of scores: there are two of both
    RingPlace<2> item_place;
    RingPlace<1> kv_place;
    float dk[T::kHeadDim / 2], dv[T::kHeadDim / 2];
    uint32_t values[kValueFragments<T> > 0 ? kValueFragments<T> : 1][4];

    __device__ __forceinline__ TallConsumer(Params const& p, Shared<T>& s, int group) : p(p), s(s), group(group) {}

    __device__ __forceinline__ void load_values() {
        int const lane = threadIdx.x % 32, row = 64 * group + threadIdx.x % 128 / 32 * 16 + lane % 16;
        uint32_t const tile = ptx::shared_address(s.v);
#pragma unroll
        for (int i = 0; i < kValueFragments<T>; i++) {
            ptx::ldmatrix_x4(tile + TileK::offset(row, 16 * i + lane / 16 * 8), values[i]);
        }
    }

    // Which consumer computes scores and probabilities: the first one begins.
    __device__ __forceinline__ void wait_for_turn() { ptx::barrier_sync(kTurnBarrier + group, 256); }
    __device__ __forceinline__ void pass_turn_on() { ptx::barrier_arrive(kTurnBarrier + 1 - group, 256); }

    // Hands over the gradients of the queries of a step, whose products must have been waited for.
    __device__ __forceinline__ void finish_dq_of(Dq<T>& dq, RingPlace<2> const& of) {
        ptx::fence_registers(dq);
        Target const target = s.ds_target[of.stage()];
        arrive_warp(&s.ds_empty[of.stage()]);
        hand_over_dq(s, dq, target, of, group);
    }

    // Hands gradients of scores over to all consumers.
    __device__ __forceinline__ void publish(Fragments<T> const& ds_fragments) {
        int const stage = place.stage();
        ptx::mbarrier_try_wait_parity(&s.ds_empty[stage], place.parity() ^ 1);
        store_scores<T>(s.ds[stage], ds_fragments, 64 * group);
        if (threadIdx.x == 128) s.ds_target[stage] = {s.step[stage].w, s.rank[stage]};
        ptx::fence_proxy_async_shared();
        arrive_warp(&s.ds_full[stage]);
    }

    // A tile of queries none of which sees a key of this consumer, and the gradients of the queries two before.
    __device__ __forceinline__ void rest(int i) {
        int const stage = place.stage();
        ptx::mbarrier_try_wait_parity(&s.q_full[stage], place.parity());
        ptx::mbarrier_try_wait_parity(&s.dout_full[stage], place.parity());
        wait_for_turn();
        pass_turn_on();
        arrive_warp(&s.dout_empty[stage]);
        if (i > 1) {
            Dq<T> dq;
            ptx::mbarrier_try_wait_parity(&s.ds_full[stage], place.parity() ^ 1);
            ptx::wgmma_fence();
            multiply_scores_transposed<T>(dq, s.ds[stage], s.k, group);
            ptx::wgmma_commit_group();
            ptx::wgmma_wait_group<0>();
            finish_dq_of(dq, place);
        }
        publish({});
        arrive_warp(&s.q_empty[stage]);
        place.advance();
    }

    // Tile of queries i of an item, and the gradients of the queries two before, whose buffers this one takes over. If there
    // were none, what is computed in their place is not used.
    __device__ __forceinline__ void step(int key, int i) {
        Fragments<T> p_fragments, ds_fragments;
        [[maybe_unused]] Fragments<T> factors;  // what the gradients of probabilities are multiplied by, under a cap
        int const stage = place.stage();
        ptx::mbarrier_try_wait_parity(&s.q_full[stage], place.parity());
        ptx::mbarrier_try_wait_parity(&s.dout_full[stage], place.parity());
        wait_for_turn();
        {
            Dq<T> dq;
            {
                Scores<T> scores;
                ptx::mbarrier_try_wait_parity(&s.ds_full[stage], place.parity() ^ 1);
                ptx::wgmma_fence();
                multiply_columns<Element, TileK, TileQ>(scores, s.k, 64 * group, s.q[stage]);
                ptx::wgmma_commit_group();
                StepMask<T> const mask(p, s.step[stage], key);
                ptx::wgmma_wait_group<0>();
                ptx::fence_registers(scores);
                mask.apply(scores);
                to_probabilities<T>(p, scores, p_fragments, terms_of_thread<T>(s.row_terms[stage][0]));
                if constexpr (T::kSoftcap) to_fragments<Element>(scores, factors);
            }
            pass_turn_on();
            ptx::wgmma_fence();
            multiply_scores_transposed<T>(dq, s.ds[stage], s.k, group);
            ptx::wgmma_commit_group();
            multiply_rows<Element, TileQ>(dv, p_fragments, s.dout[stage]);
            ptx::wgmma_commit_group();
            ptx::wgmma_wait_group<1>();
            ptx::fence_registers(dq);
            if (i > 1) finish_dq_of(dq, place);
        }
        Scores<T> ds;
        ptx::wgmma_fence();
        if constexpr (kValueFragments<T> > 0) {
            multiply_columns<Element, TileK, TileQ>(ds, values, s.v, 64 * group, s.dout[stage]);
        } else {
            multiply_columns<Element, TileK, TileQ>(ds, s.v, 64 * group, s.dout[stage]);
        }
        ptx::wgmma_commit_group();
        ptx::wgmma_wait_group<0>();
        ptx::fence_registers(ds);
        rounded_to_score_gradients<T>(T::kSoftcap ? factors : p_fragments, ds, ds_fragments,
                                      terms_of_thread<T>(s.row_terms[stage][1]));
        arrive_warp(&s.dout_empty[stage]);
        ptx::wgmma_fence();
        multiply_rows<Element, TileQ>(dk, ds_fragments, s.q[stage]);
        ptx::wgmma_commit_group();
        publish(ds_fragments);
        ptx::wgmma_wait_group<0>();
        arrive_warp(&s.q_empty[stage]);
        place.advance();
    }

    // All steps of an item; returns how many.
    __device__ __forceinline__ int steps(int key) {
        int const num_steps = item_in(s, item_place).num_steps();
        for (int i = 0; i < num_steps; i++) step(key, i);
        return num_steps;
    }

    // The same, which rests. Without `uniform` the compiler would take places of the rings for other ones in each thread.
    __device__ __forceinline__ int steps_and_rests(int key) {
        int i = 0;
        for (int pack = 0; true; pack++) {
            Item const item = item_in(s, item_place);
            Rests const rests = rests_in(s, item_place, group);
            bool const is_left = uniform(pack < item.packs);
            int left = uniform((is_left ? rests.first : 0) + (pack > 0 ? rests.last : 0));
            for (; left > 0; left--) rest(i++);
            if (!is_left) return i;
            for (left = uniform(item.steps - rests.first - rests.last); left > 0; left--) step(key, i++);
        }
    }
    static __device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }

    // All but for handing over the gradients of the last queries, which wait in `of_last` until those of keys and values are
    // written, while the ones before are added and the next keys come.
    __device__ __forceinline__ void differentiate(int tile, Dq<T>& of_last) {
        int const key = tile * T::kTileN + 64 * group;
        ptx::mbarrier_try_wait_parity(&s.k_full, kv_place.parity());
        ptx::mbarrier_try_wait_parity(&s.v_full, kv_place.parity());
        load_values();
        int const num_steps = kRests<T> ? steps_and_rests(key) : steps(key);
        ptx::wgmma_wait_group<0>();
        ptx::fence_registers(dk);
        ptx::fence_registers(dv);
        // Both of the last two at once, so that the keys are free. If there was one step, the first is not used.
        RingPlace<2> const last = place.before(), before = last.before();
        Dq<T> of_before;
        if (num_steps > 1) ptx::mbarrier_try_wait_parity(&s.ds_full[before.stage()], before.parity());
        ptx::mbarrier_try_wait_parity(&s.ds_full[last.stage()], last.parity());
        ptx::wgmma_fence();
        multiply_scores_transposed<T>(of_before, s.ds[before.stage()], s.k, group);
        multiply_scores_transposed<T>(of_last, s.ds[last.stage()], s.k, group);
        ptx::wgmma_commit_group();
        ptx::wgmma_wait_group<0>();
        arrive_warp(&s.kv_empty);
        kv_place.advance();
        if (num_steps > 1) finish_dq_of(of_before, before);
        ptx::fence_registers(of_last);
    }

    __device__ __forceinline__ void run() {
        if (group == 1) pass_turn_on();
        while (true) {
            Item const next = next_item(s, item_place);
            if (next.tile < 0) break;
#pragma unroll
            for (int i = 0; i < T::kHeadDim / 2; i++) dk[i] = dv[i] = 0;
            Dq<T> dq;
            if (next.steps > 0) differentiate(next.tile, dq);
            Item const item = item_in(s, item_place);
            KeyRange const keys = keys_in(s, item_place, 64 * group);
            leave_item(s, item_place);
            if (exchange_with_items<T>(p, item, group, dk, dv)) {
                store_rows<T, T::kHeadDimV>(dv, p.dv, p.out_mode, keys, p.num_kv_heads, item.kv_head, 1);
                store_rows<T, T::kHeadDim>(dk, p.dk, p.out_mode, keys, p.num_kv_heads, item.kv_head, p.scale);
                tell_written(p, item.tile, group);
            }
            if (item.steps > 0) finish_dq_of(dq, place.before());
        }
        finish_dq(s, place, group);
    }
};

}  // namespace magi::backward
