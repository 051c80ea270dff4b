// SPDX-License-Identifier: Apache-2.0
// Places in rings of buffers.
#pragma once

#include <cstdint>

namespace magi {

// A place in a ring of buffers, and the parity of the barriers' phase there.
template <int Stages>
class RingPlace {
    static constexpr bool kCounts = (Stages & (Stages - 1)) == 0;  // one number holds both
    int stage_or_count_ = 0;
    uint32_t parity_ = 0;

   public:
    __device__ __forceinline__ int stage() const { return kCounts ? stage_or_count_ & (Stages - 1) : stage_or_count_; }
    __device__ __forceinline__ uint32_t parity() const { return kCounts ? stage_or_count_ / Stages & 1 : parity_; }
    __device__ __forceinline__ void advance() {
        stage_or_count_++;
        if (!kCounts && stage_or_count_ == Stages) {
            stage_or_count_ = 0;
            parity_ ^= 1;
        }
    }
    // The place before this one, which has advanced at least once.
    __device__ __forceinline__ RingPlace before() const {
        RingPlace place = *this;
        if (!kCounts && stage_or_count_ == 0) {
            place.stage_or_count_ = Stages;
            place.parity_ ^= 1;
        }
        place.stage_or_count_--;
        return place;
    }
};

}  // namespace magi
