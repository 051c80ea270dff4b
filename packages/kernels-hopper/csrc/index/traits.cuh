// SPDX-License-Identifier: Apache-2.0
// Sizes of a kernel of index attention, and its shared memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../layout.cuh"
#include "params.cuh"

namespace magi::index {

template <typename T>
struct SharedOfForward;

// The sizes that are chosen by measurement; variants.py has those of each kernel.
//   Stages:            tiles of keys and values in shared memory
//   Blocks:            that share a multiprocessor
//   ConsumerRegisters: of a thread that computes; ProducerRegisters: of a thread that loads
template <int HeadDim, int HeadDimV, typename Element_, bool Softcap, int Stages, int Blocks, int ConsumerRegisters,
          int ProducerRegisters>
struct Traits {
    using Element = Element_;
    using Params = index::Params;
    using Shared = SharedOfForward<Traits>;
    static constexpr bool kDifferentiates = false;
    static constexpr int kHeadDim = HeadDim;
    static constexpr int kHeadDimV = HeadDimV;
    static constexpr bool kSoftcap = Softcap;
    static constexpr bool kStagesOut = false;
    static constexpr bool kShrinksRarely = false;
    static constexpr int kStages = Stages;
    static constexpr int kBlocks = Blocks;
    static constexpr int kTileM = 64;
    static constexpr int kTileN = 64;
    static constexpr int kBoxN = kTileN / 2;  // masks are applied to halves
    static constexpr int kThreads = 256;
    static constexpr int kConsumerRegisters = ConsumerRegisters;
    static constexpr int kProducerRegisters = ProducerRegisters;

    using TileQ = PanelTile<kTileM, HeadDim>;
    using TileK = PanelTile<kTileN, HeadDim>;
    using TileV = PanelTile<kTileN, HeadDimV>;
    static_assert(Blocks * 128 * (ConsumerRegisters + ProducerRegisters) <= 65536, "registers of one multiprocessor");
};

// Tiles are aligned to the swizzle's pattern.
template <typename T>
struct alignas(1024) SharedOfForward {
    uint8_t q[T::TileQ::kBytes];
    uint8_t k[T::kStages][T::TileK::kBytes];
    uint8_t v[T::kStages][T::TileV::kBytes];
    uint64_t q_full, q_empty;
    uint64_t full[T::kStages], empty[T::kStages];
    uint8_t bits[T::kStages][64];  // of keys: for which of the tokens that share the tile of queries they count
    int keys[T::kStages];  // how many of a tile's keys there are, negative less one in the last tile of a list
};

}  // namespace magi::index
