// SPDX-License-Identifier: Apache-2.0
// Gradients of queries are added up in device memory, by all tiles of keys that meet them.
#pragma once

#include "../ptx/barrier.cuh"
#include "../ptx/cp_async_bulk.cuh"
#include "../ptx/shared.cuh"
#include "../ring.cuh"
#include "finisher.cuh"
#include "params.cuh"
#include "shared.cuh"

namespace magi::backward {

// What the warp has read by products must have been waited for.
__device__ __forceinline__ void arrive_warp(uint64_t* barrier) { ptx::mbarrier_arrive_warp(barrier); }

// What a tile of keys may do to a part of a tile's gradients: as the first one it writes, the others add.
enum class Turn { kWrite, kAdd, kLater };

// The count of additions while the first one is under way, where the order does not matter.
constexpr int kClaimed = 1 << 30;

// Whose turn it is. Where the order does not matter, the first one to ask writes, and has claimed to from then on.
__device__ __forceinline__ Turn turn_of(Params const& p, int part, int rank) {
    if (p.ranks != nullptr) {
        if (rank == 0) return Turn::kWrite;
        return ptx::load_acquire(p.added + part) >= rank ? Turn::kAdd : Turn::kLater;
    }
    int const there = ptx::compare_swap_acquire(p.added + part, 0, kClaimed);
    return there == 0 ? Turn::kWrite : there == kClaimed ? Turn::kLater : Turn::kAdd;
}

// Waits for a turn that comes later: to add.
__device__ __forceinline__ void wait_for_turn(Params const& p, int part, int rank) {
    if (p.ranks == nullptr) {
        while (ptx::load_acquire(p.added + part) == kClaimed) continue;
    } else {
        while (ptx::load_acquire(p.added + part) < rank) continue;
    }
}

// Tells that one more tile of keys has written, or added to, a part of a tile's gradients.
template <typename T>
__device__ __forceinline__ void count_addition(Params const& p, int tile, int part, bool written) {
    int const adders = __ldg(p.adders + tile % p.num_tiles_q);
    int const more = written && p.ranks == nullptr ? 1 - kClaimed : 1;
    if (ptx::add_acquire_release(p.added + part, more) + more == adders) Finisher<T>::push(p, part);
}

// Adds a part of the gradients, from a consumer's registers; the first one to add writes.
template <typename T>
__device__ __forceinline__ void add_dq(Params const& p, Shared<T>& s, float const (&dq)[T::kDqRegisters], Target target,
                                       int group, int pass) {
    int const part = target.tile * T::kDqParts + group, thread = threadIdx.x % 128;
    if (pass == 0) {
        if (thread == 0) {
            Turn const turn = turn_of(p, part, target.rank);
            if (turn == Turn::kLater) wait_for_turn(p, part, target.rank);
            s.writes_dq[group] = turn == Turn::kWrite;
        }
        ptx::barrier_sync(kOwnBarrier + group, 128);
    }
    bool const writes = s.writes_dq[group];
    float* const sums =
        p.dq_sums + static_cast<int64_t>(part) * T::kDqFloats + pass * T::kDqRegisters * 128 + thread * 4;
#pragma unroll
    for (int i = 0; i < T::kDqRegisters; i += 4) {
        if (writes) {
            *reinterpret_cast<float4*>(sums + i * 128) = make_float4(dq[i], dq[i + 1], dq[i + 2], dq[i + 3]);
        } else {
            ptx::red_add(sums + i * 128, dq[i], dq[i + 1], dq[i + 2], dq[i + 3]);
        }
    }
    if (pass == T::kDqPasses - 1) {
        ptx::barrier_sync(kOwnBarrier + group, 128);
        if (thread == 0) count_addition<T>(p, target.tile, part, writes);
    }
}

// The parity of a consumer's part of the gradients of a step, which is counted by `step`.
template <typename T>
__device__ __forceinline__ uint32_t dq_parity(RingPlace<2> const& step) {
    return T::kDqAlternates ? step.parity() : step.stage();
}

// Hands a part of the gradients of a step over to the thread that adds them.
template <typename T>
__device__ __forceinline__ void hand_over_dq(Shared<T>& s, float const (&dq)[T::kDqRegisters], Target target,
                                             RingPlace<2> const& step, int group) {
    int const thread = threadIdx.x % 128;
    ptx::mbarrier_try_wait_parity(&s.dq_empty[group], dq_parity<T>(step) ^ 1);
    uint32_t const address = ptx::shared_address(s.dq[group]) + thread * sizeof(float4);
#pragma unroll
    for (int i = 0; i < T::kDqRegisters; i += 4) {
        ptx::store_shared(address + i * 128 * sizeof(float), dq[i], dq[i + 1], dq[i + 2], dq[i + 3]);
    }
    if (thread == 0) s.dq_target[group] = target;
    ptx::fence_proxy_async_shared();
    arrive_warp(&s.dq_full[group]);
}

// Tells that thread that there are none left: `step` is the next one of which there would be a part.
template <typename T>
__device__ __forceinline__ void finish_dq(Shared<T>& s, RingPlace<2> const& step, int group) {
    ptx::mbarrier_try_wait_parity(&s.dq_empty[group], dq_parity<T>(step) ^ 1);
    if (threadIdx.x % 128 == 0) s.dq_target[group].tile = -1;
    arrive_warp(&s.dq_full[group]);
}

}  // namespace magi::backward
