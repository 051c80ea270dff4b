// SPDX-License-Identifier: Apache-2.0
// Sizes of a forward kernel, and its shared memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../layout.cuh"

namespace magi::forward {

// The sizes that are chosen by measurement; variants.py has those of each kernel. Keys are loaded in boxes, two of which
// make a tile.
//   Consumers:         warpgroups that compute, each with 64 rows of scores
//   BoxN:              keys of a box
//   Stages:            tiles of keys, and as many of values, in shared memory
//   ConsumerRegisters: of a consumer's thread; ProducerRegisters: of each thread of the loading warpgroup
template <int HeadDim, int HeadDimV, typename Element_, bool Softcap, int Consumers, int BoxN, int Stages,
          int ConsumerRegisters, int ProducerRegisters>
struct Traits {
    using Element = Element_;
    static constexpr int kHeadDim = HeadDim;
    static constexpr int kHeadDimV = HeadDimV;
    static constexpr bool kSoftcap = Softcap;
    static constexpr int kConsumers = Consumers;
    static constexpr int kStages = Stages;
    static constexpr int kTileM = 64 * kConsumers;
    static constexpr int kBoxN = BoxN;
    static constexpr int kTileN = 2 * kBoxN;
    static constexpr int kThreads = 128 * (kConsumers + 1);
    static constexpr int kConsumerRegisters = ConsumerRegisters;
    static constexpr int kProducerRegisters = ProducerRegisters;

    using TileQ = PanelTile<kTileM, HeadDim>;
    using TileK = PanelTile<kTileN, HeadDim>;
    using TileV = PanelTile<kTileN, HeadDimV>;
    static_assert(kTileN % 16 == 0, "keys are multiplied 16 at a time");
    static_assert(kBoxN / 4 <= 32, "a row's mask of a box must fit a word");
    static_assert(128 * (kConsumers * kConsumerRegisters + kProducerRegisters) <= 65536,
                  "registers of one multiprocessor");
};

// What the blocks of a kernel keep in shared memory. Tiles are aligned to the swizzle's pattern.
template <typename T>
struct alignas(1024) Shared {
    uint8_t q[T::TileQ::kBytes];
    uint8_t k[T::kStages][T::TileK::kBytes];
    uint8_t v[T::kStages][T::TileV::kBytes];
    uint64_t q_full, q_empty;
    uint64_t k_full[T::kStages], k_empty[T::kStages];
    uint64_t v_full[T::kStages], v_empty[T::kStages];
    uint64_t item_full[2], item_empty[2];
    int item[2][8];
};

}  // namespace magi::forward
