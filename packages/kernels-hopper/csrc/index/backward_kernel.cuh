// SPDX-License-Identifier: Apache-2.0
// The backward pass of index attention. As in the forward pass, one warpgroup gathers keys and values, and the other
// computes. Gradients of a token's queries stay in registers. Those of keys and values are computed for a tile of a list,
// and added to their rows in device memory, or stored apart: moving them takes longer than computing them, so that two
// blocks share a multiprocessor where heads are narrow.
#pragma once

#include "../backward/consumer.cuh"
#include "backward_traits.cuh"
#include "producer.cuh"

namespace magi::index {

constexpr uint32_t kConsumerBarrier = 1;

template <typename T>
struct BackwardConsumer {
    using Element = typename T::Element;
    using Fragments = backward::Fragments<T>;
    using Pass = float[T::kPassColumns / 2];
    BackwardParams const& p;
    typename T::Shared& s;
    RingPlace<T::kStages> place;
    RingPlace<1> q_place;
    float dq[T::kHeadDim / 2];
int keys;                    // of the tile
    int places[2][2];            // of the rows that the thread moves

    __device__ __forceinline__ BackwardConsumer(BackwardParams const& p, typename T::Shared& s) : p(p), s(s) {}

    // What the warp has read by products must have been waited for.
    __device__ __forceinline__ void release(uint64_t* empty) { ptx::mbarrier_arrive_warp(empty); }

    // Accumulators of a row are moved by eight threads, 128 bytes at a time: four threads that have a row each first
    // exchange columns with four others, and then move one row after the other. The first of the two, and of those 8 later:
    __device__ __forceinline__ static int moved_row(int r) {
        return threadIdx.x % 128 / 32 * 16 + 8 * r + threadIdx.x % 32 / 8 * 2;
    }

    __device__ __forceinline__ void read_places() {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int2 const two = *reinterpret_cast<int2 const*>(s.places[place.stage()] + moved_row(r));
            places[r][0] = two.x, places[r][1] = two.y;
        }
    }

    // dq += ds k, over the tile's keys
    __device__ __forceinline__ void multiply_scores() {
        uint64_t const ds = T::TileDs::k_major(backward::uniform_address(s.ds));
        uint64_t const k = T::TileK::mn_major(backward::uniform_address(s.k[place.stage()]));
#pragma unroll
        for (int key = 0; key < T::kTileN; key += 16) {
            ptx::Wgmma<T::kHeadDim>::template ss<Element, 0, 1>(dq, ds + T::TileDs::from(0, key),
                                                                k + T::TileK::from(key, 0), true);
        }
    }

    // Starts some columns of the tile's gradients of values or, in later passes, of keys.
    template <int Number>
    __device__ __forceinline__ void start_pass(Pass& sums, Fragments const& probabilities, Fragments const& ds) {
        constexpr bool kOfValues = Number < T::kPassesOfValues;
        using Tile = std::conditional_t<kOfValues, typename T::TileDout, typename T::TileQ>;
        constexpr int kColumn = (kOfValues ? Number : Number - T::kPassesOfValues) * T::kPassColumns;
        uint64_t const rows =
            Tile::mn_major(backward::uniform_address(kOfValues ? s.dout : s.q)) + Tile::from(0, kColumn);
        ptx::wgmma_fence();
#pragma unroll
        for (int row = 0; row < 64; row += 16) {
            ptx::Wgmma<T::kPassColumns>::template rs<Element, 1>(sums, (kOfValues ? probabilities : ds)[row / 16],
                                                                 rows + Tile::from(row, 0), row > 0);
        }
        ptx::wgmma_commit_group();
    }

    // Moves them to device memory: `move` takes whether there is a place, the place, and what is to go there.
    template <int Number, typename Move>
    __device__ __forceinline__ void move_pass(Pass const& sums, Move const& move) {
        constexpr bool kOfValues = Number < T::kPassesOfValues;
        constexpr int kDim = kOfValues ? T::kHeadDimV : T::kHeadDim;
        constexpr int kColumn = (kOfValues ? Number : Number - T::kPassesOfValues) * T::kPassColumns;
        float* const gradients = (kOfValues ? p.dv : p.dk) + kColumn + threadIdx.x % 8 * 4;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float* const targets[2] = {gradients + static_cast<int64_t>(places[r][0]) * kDim,
                                       gradients + static_cast<int64_t>(places[r][1]) * kDim};
#pragma unroll
            for (int i = 2 * r; i < T::kPassColumns / 2; i += 16) {
                uint32_t words[4][2];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    words[j][0] = __float_as_uint(sums[i + j / 2 * 4 + j % 2]);
                    words[j][1] = __float_as_uint(sums[i + 8 + j / 2 * 4 + j % 2]);
                    exchange(words[j][0], words[j][1], 4);
                }
#pragma unroll
                for (int t = 0; t < 2; t++) {
                    float4 const four = make_float4(__uint_as_float(words[0][t]), __uint_as_float(words[1][t]),
                                                    __uint_as_float(words[2][t]), __uint_as_float(words[3][t]));
                    move(moved_row(r) + t < keys, targets[t] + 2 * (i - 2 * r), four);
                }
            }
        }
    }

    // Adds or stores them. The compiler makes a branch of each condition of an addition: most tiles do without.
    template <int Number>
    __device__ __forceinline__ void finish_pass(Pass const& sums) {
        if (p.places != nullptr) {
            move_pass<Number>(sums, [](bool there, float* to, float4 x) {
                if (there) *reinterpret_cast<float4*>(to) = x;
            });
        } else if (keys < T::kTileN) {
            move_pass<Number>(sums, [](bool there, float* to, float4 x) {
                if (there) ptx::red_add(to, x.x, x.y, x.z, x.w);
            });
        } else {
            move_pass<Number>(sums, [](bool, float* to, float4 x) { ptx::red_add(to, x.x, x.y, x.z, x.w); });
        }
    }

    // All passes from `Number` on, which is under way.
    template <int Number>
    __device__ __forceinline__ void passes(Pass& sums, Pass& next, Fragments const& probabilities, Fragments const& ds) {
        constexpr bool kIsLast = Number + 1 == T::kPasses;
        if constexpr (T::kPassesOverlap && !kIsLast) {
            start_pass<Number + 1>(next, probabilities, ds);
            ptx::wgmma_wait_group<1>();
        } else {
            ptx::wgmma_wait_group<0>();
        }
        ptx::fence_registers(sums);
        if constexpr (Number == 0) {  // what was started before is over, too
            ptx::fence_registers(dq);
            release(&s.empty[place.stage()]);
        }
        finish_pass<Number>(sums);
        if constexpr (!kIsLast) {
            if constexpr (T::kPassesOverlap) {
                passes<Number + 1>(next, sums, probabilities, ds);
            } else {
                start_pass<Number + 1>(sums, probabilities, ds);
                passes<Number + 1>(sums, next, probabilities, ds);
            }
        }
    }

    // Leaves the scores of keys that the query's list has.
    __device__ __forceinline__ void apply_mask(backward::Scores<T>& scores) const {
        uint4 const of_tokens = *reinterpret_cast<uint4 const*>(s.scores_of_token[threadIdx.x % 4]);
        uint32_t const words[4] = {of_tokens.x, of_tokens.y, of_tokens.z, of_tokens.w};
        uint32_t bits[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int const key = accumulator_row(threadIdx.x % 128, 2 * r);
            if (p.lists.bits == nullptr) {
                bits[r] = key < keys ? ~0u : 0;
                continue;
            }
            uint32_t const tokens = s.bits[place.stage()][key];
            bits[r] = 0;
#pragma unroll
            for (int t = 0; t < 8; t++) {
                if (tokens >> t & 1) bits[r] |= words[t / 2] >> (t % 2 * 16) & 0xFFFF;
            }
        }
        backward::apply_mask(scores, bits);
    }

    // The gradients that a tile of keys gives.
    __device__ __forceinline__ void step() {
        backward::Scores<T> scores, ds;
        Fragments probabilities, of_scores;
        int const stage = place.stage();
        ptx::wgmma_fence();
        backward::multiply_columns<Element, typename T::TileK, typename T::TileQ>(scores, s.k[stage], 0, s.q);
        ptx::wgmma_commit_group();
        backward::multiply_columns<Element, typename T::TileV, typename T::TileDout>(ds, s.v[stage], 0, s.dout);
        ptx::wgmma_commit_group();
        read_places();
        ptx::wgmma_wait_group<1>();
        ptx::fence_registers(scores);
        if (p.lists.bits != nullptr || keys < T::kTileN) apply_mask(scores);
        backward::to_probabilities<T>(p, scores, probabilities, backward::terms_of_thread<T>(s.terms[0]));
        ptx::wgmma_wait_group<0>();
        ptx::fence_registers(ds);
        backward::to_score_gradients<T>(scores, ds, of_scores, backward::terms_of_thread<T>(s.terms[1]));
        ptx::barrier_sync(kConsumerBarrier, 128);  // all have read what they need of the tile before
        backward::store_scores<T>(s.ds, of_scores, 0);
        ptx::fence_proxy_async_shared();
        ptx::barrier_sync(kConsumerBarrier, 128);
        ptx::wgmma_fence();
        multiply_scores();
        ptx::wgmma_commit_group();
        Pass first, second;
        start_pass<0>(first, probabilities, of_scores);
        passes<0>(first, second, probabilities, of_scores);
    }

    __device__ __forceinline__ void store_dq(Item const& item) {
        int const lane = threadIdx.x % 4;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            QueryRow const row = item.row(p.lists, accumulator_row(threadIdx.x % 128, 2 * r));
            auto* const target = static_cast<Element*>(p.dq) + row.index(p.lists) * T::kHeadDim + 8 * lane;
#pragma unroll
            for (int column = 0; column < T::kHeadDim; column += 32) {
                uint32_t words[4];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    int const i = column / 2 + 4 * j + 2 * r;
                    words[j] = pack(dq[i] * p.dq_scale, dq[i + 1] * p.dq_scale, Element{});
                }
                transpose_quad(words);
                if (row.inside) {
                    *reinterpret_cast<uint4*>(target + column) = make_uint4(words[0], words[1], words[2], words[3]);
                }
            }
        }
    }

    __device__ __forceinline__ void run() {
        int64_t const num_items = p.lists.num_items();
        for (int64_t number = blockIdx.x; number < num_items; number += gridDim.x) {
#pragma unroll
            for (int i = 0; i < T::kHeadDim / 2; i++) dq[i] = 0;
            ptx::mbarrier_try_wait_parity(&s.q_full, q_place.parity());
            bool is_last;
            do {
                ptx::mbarrier_try_wait_parity(&s.full[place.stage()], place.parity());
                keys = s.keys[place.stage()];
                is_last = keys < 0;
                keys = is_last ? ~keys : keys;
                step();
                place.advance();
            } while (!is_last);
            release(&s.q_empty);
            q_place.advance();
            store_dq(Item(p.lists, number));
        }
    }
};

template <typename T>
__device__ __forceinline__ void differentiate(BackwardParams const& p) {
    extern __shared__ __align__(1024) uint8_t memory[];
    auto& s = *reinterpret_cast<typename T::Shared*>(memory);
    int const warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
    // Rows after the last query head are never loaded, but multiplied by zeros.
    for (int i = threadIdx.x; i < (T::TileQ::kBytes + T::TileDout::kBytes) / 16; i += T::kThreads) {
        reinterpret_cast<uint4*>(s.q)[i] = make_uint4(0, 0, 0, 0);
    }
    ptx::fence_proxy_async_shared();
    if (threadIdx.x < 32) {
        int const kind = threadIdx.x / 8, token = threadIdx.x % 8;
        uint32_t bits = 0;
        for (int i = 0; i < T::kTileM / 4; i++) {
            bits |= (i / 2 * 8 + kind * 2 + i % 2) / p.lists.pack == token ? 1u << i : 0;
        }
        s.scores_of_token[kind][token] = static_cast<uint16_t>(bits);
    }
    if (threadIdx.x == 0) {
        init_barriers<T>(s);
        ptx::prefetch_tensormap(&p.q);
        ptx::prefetch_tensormap(&p.dout);
    }
    __syncthreads();
    if (warpgroup == 0) {
        ptx::setmaxnreg_dec<T::kProducerRegisters>();
        Producer<T>(p, s).run();
    } else {
        ptx::setmaxnreg_inc<T::kConsumerRegisters>();
        BackwardConsumer<T>(p, s).run();
    }
}

}  // namespace magi::index
