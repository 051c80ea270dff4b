// SPDX-License-Identifier: Apache-2.0
// Sizes of a forward kernel, and its shared memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../layout.cuh"
#include "schedule.cuh"

namespace magi::forward {

// The sizes that are chosen by measurement; variants.py has those of each kernel. Keys are loaded in boxes, two of which
// make a tile.
//   Consumers:         warpgroups that compute, each with 64 rows of scores
//   BoxN:              keys of a box
//   Stages:            tiles of keys, and as many of values, in shared memory
//   StagesOut:         outputs go through shared memory
//   ShrinksRarely:     what was summed up is scaled only where a row's largest score has grown by much
//   ConsumerRegisters: of a consumer's thread; ProducerRegisters: of each thread of the loading warpgroup
template <int HeadDim, int HeadDimV, typename Element_, bool Softcap, int Consumers, int BoxN, int Stages,
          bool StagesOut, bool ShrinksRarely, int ConsumerRegisters, int ProducerRegisters>
struct Traits {
    using Element = Element_;
    static constexpr int kHeadDim = HeadDim;
    static constexpr int kHeadDimV = HeadDimV;
    static constexpr bool kSoftcap = Softcap;
    static constexpr int kConsumers = Consumers;
    static constexpr int kStages = Stages;
    static constexpr int kBoxN = BoxN;
    static constexpr int kTileN = 2 * kBoxN;
    static constexpr int kHalfN = (kBoxN + 15) / 16 * 16;  // what is computed of a tile with one box
    static constexpr int kThreads = 128 * (kConsumers + 1);
    static constexpr int kConsumerRegisters = ConsumerRegisters;
    static constexpr int kProducerRegisters = ProducerRegisters;

    static constexpr bool kStagesOut = StagesOut;
    static constexpr bool kShrinksRarely = ShrinksRarely;
    using TileQ = PanelTile<64, HeadDim>;  // of one consumer
    using TileOut = PanelTile<64, HeadDimV>;
    using TileK = PanelTile<kTileN, HeadDim>;
    using TileV = PanelTile<kTileN, HeadDimV>;
    static_assert(kTileN % 16 == 0, "keys are multiplied 16 at a time");
    static_assert(kBoxN / 4 <= 32, "a row's mask of a box must fit a word");
    // A block starts with the same number for each thread, a multiple of 8, and warpgroups exchange them.
    static_assert(kConsumers * kConsumerRegisters + kProducerRegisters <= (kConsumers + 1) * (65536 / kThreads / 8 * 8),
                  "registers of the block");
};

// What the blocks of a kernel keep in shared memory. Tiles are aligned to the swizzle's pattern.
template <typename T>
struct alignas(1024) Shared {
    uint8_t q[T::kConsumers][T::TileQ::kBytes];
    uint8_t k[T::kStages][T::TileK::kBytes];
    uint8_t v[T::kStages][T::TileV::kBytes];
    uint8_t out[T::kConsumers][T::kStagesOut ? T::TileOut::kBytes : 16];  // on their way to device memory
    uint64_t q_full[T::kConsumers], q_empty[T::kConsumers];
    uint64_t out_full[T::kConsumers], out_empty[T::kConsumers];
    uint64_t k_full[T::kStages], k_empty[T::kStages];
    uint64_t v_full[T::kStages], v_empty[T::kStages];
    uint64_t item_full[2], item_empty[2];
    Item item[2];
};

}  // namespace magi::forward
