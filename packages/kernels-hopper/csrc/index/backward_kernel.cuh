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
    int places[2][T::kChunks];   // of the rows that the thread moves

    __device__ __forceinline__ BackwardConsumer(BackwardParams const& p, typename T::Shared& s) : p(p), s(s) {}

    // What the warp has read by products must have been waited for.
    __device__ __forceinline__ void release(uint64_t* empty) { ptx::mbarrier_arrive_warp(empty); }

    // Accumulators are moved by groups of threads that have a row each: once they have changed places, each of the groups
    // moves a chunk of 16 columns of all these rows, one after another. The first of them, and of the next 8:
    __device__ __forceinline__ static int moved_row(int r) {
        int const lane = threadIdx.x % 32;
        return threadIdx.x % 128 / 32 * 16 + 8 * r + lane / (4 * T::kChunks) * T::kChunks;
    }

    __device__ __forceinline__ void read_places() {
#pragma unroll
        for (int r = 0; r < 2; r++) {
#pragma unroll
            for (int t = 0; t < T::kChunks; t++) places[r][t] = s.places[place.stage()][moved_row(r) + t];
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

    // What four accumulators of a chunk become those of.
    __device__ __forceinline__ static void change_places(uint32_t (&words)[T::kChunks]) {
        if constexpr (T::kChunks == 4) {
            transpose_quad<4>(words);
        } else {
            static_assert(T::kChunks == 2, "chunks that two or four groups exchange");
            exchange(words[0], words[1], 4);
        }
    }

    // Adds or stores them, whole lines of the cache at a time.
    template <int Number>
    __device__ __forceinline__ void finish_pass(Pass const& sums) {
        constexpr bool kOfValues = Number < T::kPassesOfValues;
        constexpr int kDim = kOfValues ? T::kHeadDimV : T::kHeadDim;
        constexpr int kColumn = (kOfValues ? Number : Number - T::kPassesOfValues) * T::kPassColumns;
        int const lane = threadIdx.x % 32;
        float* const gradients = (kOfValues ? p.dv : p.dk) + kColumn + lane / 4 % T::kChunks * 16 + lane % 4 * 4;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            uint32_t words[4][T::kChunks];
#pragma unroll
            for (int j = 0; j < 4; j++) {
#pragma unroll
                for (int t = 0; t < T::kChunks; t++) {
                    words[j][t] = __float_as_uint(sums[8 * t + 2 * r + j / 2 * 4 + j % 2]);
                }
                change_places(words[j]);
            }
#pragma unroll
            for (int t = 0; t < T::kChunks; t++) {
                if (moved_row(r) + t >= keys) continue;
                float* const target = gradients + static_cast<int64_t>(places[r][t]) * kDim;
                float4 const four = make_float4(__uint_as_float(words[0][t]), __uint_as_float(words[1][t]),
                                                __uint_as_float(words[2][t]), __uint_as_float(words[3][t]));
                if (p.places == nullptr) {
                    ptx::red_add(target, four.x, four.y, four.z, four.w);
                } else {
                    *reinterpret_cast<float4*>(target) = four;
                }
            }
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
        if (keys < T::kTileN) {
#pragma unroll
            for (int i = 0; i < T::kTileM / 2; i++) {
                scores[i] = accumulator_row(threadIdx.x % 128, i) < keys ? scores[i] : -INFINITY;
            }
        }
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
            int const row = accumulator_row(threadIdx.x % 128, 2 * r);
            int64_t const head = static_cast<int64_t>(item.token) * p.lists.num_heads() + item.pack * p.lists.pack + row;
            auto* const target = static_cast<Element*>(p.dq) + head * T::kHeadDim + 8 * lane;
#pragma unroll
            for (int column = 0; column < T::kHeadDim; column += 32) {
                uint32_t words[4];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    int const i = column / 2 + 4 * j + 2 * r;
                    words[j] = pack(dq[i] * p.dq_scale, dq[i + 1] * p.dq_scale, Element{});
                }
                transpose_quad(words);
                if (row < p.lists.pack) {
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
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(&s.q_full, 1);
        ptx::mbarrier_init(&s.q_empty, 4 * ptx::kArrivalsOfWarp);
        for (int i = 0; i < T::kStages; i++) {
            ptx::mbarrier_init(&s.full[i], kProducers);
            ptx::mbarrier_init(&s.empty[i], 4 * ptx::kArrivalsOfWarp);
        }
        ptx::fence_mbarrier_init();
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
