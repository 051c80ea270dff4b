// SPDX-License-Identifier: Apache-2.0
// Attention of every query token to keys of its own, given by their rows. One warpgroup gathers keys and values to
// shared memory, once for all query heads of a key head; the other computes. Moving keys takes longer than computing with
// them, so that products of 64 rows may have empty ones, and two blocks share a multiprocessor: one computes while the
// other waits.
#pragma once

#include "../forward/epilogue.cuh"
#include "../forward/softmax.cuh"
#include "../ptx/wgmma.cuh"
#include "producer.cuh"

namespace magi::index {

template <typename T>
struct Consumer {
    using Element = typename T::Element;
    Params const& p;
    typename T::Shared& s;
    RingPlace<T::kStages> place;
    RingPlace<1> q_place;
    float scores[T::kTileN / 2];
    float out[T::kHeadDimV / 2];
    int tokens[2];  // of the thread's rows, counted from the tile's first

    __device__ __forceinline__ Consumer(Params const& p, typename T::Shared& s) : p(p), s(s) {}

    // What the warp has read by products must have been waited for.
    __device__ __forceinline__ void release(uint64_t* empty) { ptx::mbarrier_arrive_warp(empty); }

    // scores = q k^T
    __device__ __forceinline__ void multiply_keys() {
        uint64_t const q = T::TileQ::k_major(ptx::shared_address(s.q));
        uint64_t const k = T::TileK::k_major(ptx::shared_address(s.k[place.stage()]));
        ptx::wgmma_fence();
#pragma unroll
        for (int column = 0; column < T::kHeadDim; column += 16) {
            ptx::Wgmma<T::kTileN>::template ss<Element, 0, 0>(scores, q + T::TileQ::from(0, column),
                                                              k + T::TileK::from(0, column), column > 0);
        }
        ptx::wgmma_commit_group();
        ptx::wgmma_wait_group<0>();
        ptx::fence_registers(scores);
    }

    // out += probabilities v
    __device__ __forceinline__ void multiply_values() {
        uint32_t probabilities[T::kTileN / 16][4];
        to_fragments<Element>(scores, probabilities);
        uint64_t const v = T::TileV::mn_major(ptx::shared_address(s.v[place.stage()]));
        ptx::wgmma_fence();
#pragma unroll
        for (int row = 0; row < T::kTileN; row += 16) {
            ptx::Wgmma<T::kHeadDimV>::template rs<Element, 1>(out, probabilities[row / 16], v + T::TileV::from(row, 0),
                                                              true);
        }
        ptx::wgmma_commit_group();
        ptx::wgmma_wait_group<0>();
        ptx::fence_registers(out);
    }

    __device__ __forceinline__ void scale_out(float const (&factor)[2]) {
#pragma unroll
        for (int i = 0; i < T::kHeadDimV / 2; i++) out[i] *= factor[i / 2 % 2];
    }

    // Of the first `keys` columns, the bits that a thread has; all rows of a token see the same keys.
    __device__ __forceinline__ void bits_of(int keys, uint32_t (&bits)[2][2]) const {
        constexpr int kBits = T::kTileN / 8;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int const count = columns_before(threadIdx.x, keys - half * T::kTileN / 2);
            bits[half][0] = bits[half][1] = forward::low_bits(min(max(count, 0), kBits));
        }
    }

    // Of the tile's keys, those that the tokens of the thread's two rows name.
    __device__ __forceinline__ void bits_of(uint8_t const* of_keys, uint32_t (&bits)[2][2]) const {
        auto const* const pairs = reinterpret_cast<uint16_t const*>(of_keys) + threadIdx.x % 4;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            bits[half][0] = bits[half][1] = 0;
#pragma unroll
            for (int j = 0; j < T::kTileN / 16; j++) {
                uint32_t const pair = pairs[half * T::kTileN / 4 + 4 * j];
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    bits[half][r] |= (pair >> tokens[r] & 1 | pair >> (tokens[r] + 7) & 2) << 2 * j;
                }
            }
        }
    }

    __device__ __forceinline__ void attend(forward::Softmax<T>& softmax) {
        uint32_t bits[2][2];
        float shrink[2];
        bool is_last;
        ptx::mbarrier_try_wait_parity(&s.q_full, q_place.parity());
        do {
            ptx::mbarrier_try_wait_parity(&s.full[place.stage()], place.parity());
            int keys = s.keys[place.stage()];
            is_last = keys < 0;
            keys = is_last ? ~keys : keys;
            multiply_keys();
            if (is_last) release(&s.q_empty);
            if (p.lists.bits != nullptr || keys < T::kTileN) {
                if (p.lists.bits != nullptr) {
                    bits_of(s.bits[place.stage()], bits);
                } else {
                    bits_of(keys, bits);
                }
                softmax.template step<true>(scores, bits, shrink);
            } else {
                softmax.template step<false>(scores, bits, shrink);
            }
            scale_out(shrink);
            multiply_values();
            release(&s.empty[place.stage()]);
            place.advance();
        } while (!is_last);
        q_place.advance();
    }

    __device__ __forceinline__ forward::OutputRow output_row(Item const& item, int row) const {
        QueryRow const query = item.row(p.lists, row);
        return {query.token, query.head, query.inside};
    }

    __device__ __forceinline__ void run() {
#pragma unroll
        for (int r = 0; r < 2; r++) tokens[r] = min(accumulator_row(threadIdx.x % 128, 2 * r) / p.lists.pack, 7);
        int64_t const num_items = p.lists.num_items();
        for (int64_t number = blockIdx.x; number < num_items; number += gridDim.x) {
            Item const item(p.lists, number);
            forward::Softmax<T> softmax(p.scoring);
#pragma unroll
            for (int i = 0; i < T::kHeadDimV / 2; i++) out[i] = 0;
            attend(softmax);
            int const row = accumulator_row(threadIdx.x % 128, 0);
            forward::OutputRow const rows[2] = {output_row(item, row), output_row(item, row + 8)};
            forward::store<T>(p.results, softmax, out, rows);
        }
    }
};

template <typename T>
__device__ __forceinline__ void attend_to_indices(Params const& p) {
    extern __shared__ __align__(1024) uint8_t memory[];
    auto& s = *reinterpret_cast<typename T::Shared*>(memory);
    int const warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
    if (threadIdx.x == 0) {
        init_barriers<T>(s);
        ptx::prefetch_tensormap(&p.q);
    }
    __syncthreads();
    if (warpgroup == 0) {
        ptx::setmaxnreg_dec<T::kProducerRegisters>();
        Producer<T>(p, s).run();
    } else {
        ptx::setmaxnreg_inc<T::kConsumerRegisters>();
        Consumer<T>(p, s).run();
    }
}

}  // namespace magi::index
