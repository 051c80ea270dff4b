// SPDX-License-Identifier: Apache-2.0
// Gradients of queries apart from those of keys and values, for masks of small blocks: what the forward kernel does, with
// its tables and its way of loading, but for the products. A block owns a tile of queries and meets all keys that it sees,
// so that nothing is added up in device memory; gradients of scores stay in registers.
#pragma once

#include "../forward/epilogue.cuh"
#include "../forward/producer.cuh"
#include "../ptx/barrier.cuh"
#include "../ptx/wgmma.cuh"
#include "traits.cuh"

namespace magi::backward {

// What the host gives the kernel; magi_kernels_hopper/backward_queries.py has the same fields in the same order.
struct QueryParams {
    forward::Params work;    // with gradients of outputs in the place of outputs, and those of queries as results
    float const* row_terms;  // as in Params, with these two
    int log2_pack, num_tiles_q;
    float dq_scale;
};

static_assert(sizeof(QueryParams) == 896, "backward_queries.py pads its structure to this size");

template <typename F>
struct QueryShared : forward::Shared<F> {
    alignas(1024) uint8_t dout[F::kConsumers][F::TileQ::kBytes];
    uint64_t dout_full[F::kConsumers];  // empty when queries are
};

// How it loads and meets keys, as forward kernels of these sizes do: where heads share tiles, and where tiles are of one
// head. Then blocks of one consumer, two on a multiprocessor, meet masks at 64 tokens instead of 128.
template <int HeadDim, typename Element>
using TraitsOfPacks = forward::Traits<HeadDim, HeadDim, Element, false, 2, 64, 2, false, false, 240, 24>;
template <int HeadDim, typename Element>
using TraitsOfHeads = forward::Traits<HeadDim, HeadDim, Element, false, 1, 32, 2, false, false, 208, 40>;

// T are the traits of the kernel that computes the other gradients, F those of a forward kernel.
template <typename T, typename F>
struct QueryConsumer {
    static_assert(!F::kSoftcap, "registers do not suffice for two products and the slopes of scores");
    using Element = typename F::Element;
    using TileQ = typename F::TileQ;
    using TileK = typename F::TileK;

    QueryParams const& p;
    QueryShared<F>& s;
    int const group;  // which consumer
    RingPlace<F::kStages> place;
    RingPlace<2> item_place;
    float dq[F::kHeadDim / 2];
    float lse[2], delta[2];  // of the thread's rows

    __device__ __forceinline__ QueryConsumer(QueryParams const& p, QueryShared<F>& s, int group)
        : p(p), s(s), group(group) {}

    // Starts sums = a b^T, for the first N keys of a tile.
    template <int N>
    __device__ __forceinline__ void multiply_columns(float (&sums)[N / 2], void const* a, void const* b) {
        uint64_t const of_a = TileQ::k_major(ptx::shared_address(a)), of_b = TileK::k_major(ptx::shared_address(b));
#pragma unroll
        for (int column = 0; column < F::kHeadDim; column += 16) {
            ptx::Wgmma<N>::template ss<Element, 0, 0>(sums, of_a + TileQ::from(0, column), of_b + TileK::from(0, column),
                                                      column > 0);
        }
        ptx::wgmma_commit_group();
    }

    template <int Count>
    __device__ __forceinline__ void to_probabilities(float (&scores)[Count]) const {
#pragma unroll
        for (int i = 0; i < Count; i++) {
            scores[i] = exp2_approx(fmaf(scores[i], p.work.scoring.to_log2, -lse[i / 2 % 2]));
        }
    }

    // The first N keys of a tile, of which `make_mask` sets the bits.
    template <bool Masked, int N, typename MakeMask>
    __device__ __forceinline__ void step(MakeMask const& make_mask) {
        float scores[N / 2], ds[N / 2];
        uint32_t fragments[N / 16][4], bits[2][2];
        int const stage = place.stage();
        ptx::mbarrier_try_wait_parity(&s.k_full[stage], place.parity());
        ptx::wgmma_fence();
        multiply_columns<N>(scores, s.q[group], s.k[stage]);
        ptx::mbarrier_try_wait_parity(&s.v_full[stage], place.parity());
        ptx::wgmma_fence();
        multiply_columns<N>(ds, s.dout[group], s.v[stage]);
        if constexpr (Masked) make_mask(bits);
        ptx::wgmma_wait_group<1>();
        ptx::fence_registers(scores);
        if constexpr (Masked) forward::apply_mask<F::kBoxN>(scores, bits);
        to_probabilities(scores);
        ptx::wgmma_wait_group<0>();
        ptx::fence_registers(ds);
        ptx::mbarrier_arrive_warp(&s.v_empty[stage]);
#pragma unroll
        for (int i = 0; i < N / 2; i++) ds[i] = scores[i] * (ds[i] - delta[i / 2 % 2]);
        to_fragments<Element>(ds, fragments);
        uint64_t const of_k = TileK::mn_major(ptx::shared_address(s.k[stage]));
        ptx::wgmma_fence();
#pragma unroll
        for (int key = 0; key < N; key += 16) {
            ptx::Wgmma<F::kHeadDim>::template rs<Element, 1>(dq, fragments[key / 16], of_k + TileK::from(key, 0), true);
        }
        ptx::wgmma_commit_group();
        ptx::wgmma_wait_group<0>();
        ptx::fence_registers(dq);
        ptx::mbarrier_arrive_warp(&s.k_empty[stage]);
        place.advance();
    }

    // Loops, not branches: see the forward kernel's.
    __device__ __forceinline__ void differentiate(forward::Item const& item) {
        int const token[2] = {token_of(item, first_row()), token_of(item, first_row() + 8)};
        int const num_masked = min(max(item.num_masked, 1), item.num_tiles - item.num_half);
        forward::BoxCursor<F::kBoxN> cursor(p.work, item);
        auto const make_mask = [&](uint32_t (&bits)[2][2]) { forward::mask_of_tile(p.work, cursor, token, bits); };
        int left = item.num_tiles - item.num_half - num_masked;
#pragma unroll 1
        for (int i = 0; i < num_masked; i++) step<true, F::kTileN>(make_mask);
#pragma unroll 1
        for (; left > 0; left--) step<false, F::kTileN>([](uint32_t (&)[2][2]) {});
#pragma unroll 1
        for (int i = 0; i < item.num_half; i++) {
            step<true, F::kHalfN>([&](uint32_t (&bits)[2][2]) {
                int4 const run = __ldg(p.work.runs + item.last_run);
                forward::mask_of_box<F::kBoxN>(p.work, run, run.x, token, bits[0]);
                bits[1][0] = bits[1][1] = 0;
            });
        }
    }

    // The row of the consumer's share that is the thread's first; the other is 8 below.
    __device__ __forceinline__ int first_row() const { return accumulator_row(threadIdx.x % 128, 0); }

    __device__ __forceinline__ int token_of(forward::Item const& item, int row) const {
        return (item.tile * F::kConsumers + group) * p.work.share_q + row / p.work.pack;
    }

    __device__ __forceinline__ forward::OutputRow output_row(forward::Item const& item, int row) const {
        int const token = token_of(item, row), within = row / p.work.pack;
        bool const inside = within < p.work.share_q && token < p.work.results.num_q;
        return {token, item.pack * p.work.pack + row - within * p.work.pack, inside};
    }

    // The terms of a row, which lie in the order of the kernel that computes the other gradients.
    __device__ __forceinline__ void read_terms(forward::OutputRow const& row, int r) {
        int const log2_tokens = 6 - p.log2_pack;
        static_assert(T::kTileM == 64);
        int const tile = row.token >> log2_tokens, pack = row.head >> p.log2_pack;
        int const within = (row.token & ((1 << log2_tokens) - 1)) << p.log2_pack | (row.head & ((1 << p.log2_pack) - 1));
        float const* const terms =
            p.row_terms + (static_cast<int64_t>(pack) * p.num_tiles_q + tile) * 2 * T::kTerms + T::term_of(within);
        lse[r] = row.inside ? __ldg(terms) : INFINITY;
        delta[r] = row.inside ? __ldg(terms + T::kTerms) : 0;
    }

    __device__ __forceinline__ void run() {
        while (true) {
            ptx::mbarrier_try_wait_parity(&s.item_full[item_place.stage()], item_place.parity());
            forward::Item const& item = s.item[item_place.stage()];  // registers are scarce
            if (item.tile < 0) break;
            forward::OutputRow const rows[2] = {output_row(item, first_row()), output_row(item, first_row() + 8)};
#pragma unroll
            for (int r = 0; r < 2; r++) read_terms(rows[r], r);
#pragma unroll
            for (int i = 0; i < F::kHeadDim / 2; i++) dq[i] = 0;
            ptx::mbarrier_try_wait_parity(&s.q_full[group], item_place.stage());  // queries' phases are items
            ptx::mbarrier_try_wait_parity(&s.dout_full[group], item_place.stage());
            if (item.num_tiles > 0) differentiate(item);
            ptx::mbarrier_arrive_warp(&s.q_empty[group]);
            ptx::mbarrier_arrive_warp(&s.item_empty[item_place.stage()]);
#pragma unroll
            for (int i = 0; i < F::kHeadDim / 2; i++) dq[i] *= p.dq_scale;
#pragma unroll
            for (int r = 0; r < 2; r++) forward::store_elements<F>(p.work.results, dq, r, rows[r], 0);
            item_place.advance();
        }
    }
};

template <typename T, typename F>
__device__ __forceinline__ void differentiate_queries(QueryParams const& p) {
    extern __shared__ __align__(1024) uint8_t memory[];
    auto& s = *reinterpret_cast<QueryShared<F>*>(memory);
    int const warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
    if (threadIdx.x == 0) {
        for (int i = 0; i < F::kConsumers; i++) ptx::mbarrier_init(&s.dout_full[i], 1);
        forward::init_barriers<F>(s, false);
    }
    __syncthreads();
    if (warpgroup == 0) {
        ptx::setmaxnreg_dec<F::kProducerRegisters>();
        int const warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
        if (warp < 2 && ptx::elect_sync()) {
            if (warp == 0) {
                for (CUtensorMap const* map : {&p.work.q, &p.work.k, &p.work.v, &p.work.out}) ptx::prefetch_tensormap(map);
                forward::Producer<F> producer{p.work, s};
                producer.run([&](forward::Item const& item) {
                    for (int group = 0; group < F::kConsumers; group++) {
                        producer.load_rows(s.dout[group], &p.work.out, &s.dout_full[group], item, group);
                    }
                });
            } else {
                forward::read_ahead<F>(p.work, s);
            }
        }
    } else {
        ptx::setmaxnreg_inc<F::kConsumerRegisters>();
        QueryConsumer<T, F>(p, s, warpgroup - 1).run();
    }
}

}  // namespace magi::backward
