// SPDX-License-Identifier: Apache-2.0
// Sizes of a backward kernel of index attention, and its shared memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../backward/traits.cuh"
#include "params.cuh"

namespace magi::index {

template <typename T>
struct SharedOfBackward;

// Rows of queries, and the order of their terms, are as in the backward kernel for masks; tiles of keys are smaller.
template <int HeadDim, int HeadDimV, typename Element, bool Softcap, int Stages, int Blocks, int ConsumerRegisters,
          int ProducerRegisters>
struct BackwardTraits : backward::Traits<HeadDim, HeadDimV, Element, Softcap, 64, Stages> {
    using Params = BackwardParams;
    using Shared = SharedOfBackward<BackwardTraits>;
    static constexpr bool kDifferentiates = true;
    static constexpr int kBlocks = Blocks;
    static constexpr int kThreads = 256;
    static constexpr int kTileN = 64;
    static constexpr int kConsumerRegisters = ConsumerRegisters;
    static constexpr int kProducerRegisters = ProducerRegisters;

    using TileK = PanelTile<kTileN, HeadDim>;
    using TileV = PanelTile<kTileN, HeadDimV>;
    using TileDs = PanelTile<64, kTileN>;  // queries by keys
    static_assert(Blocks * 128 * (ConsumerRegisters + ProducerRegisters) <= 65536, "registers of one multiprocessor");

    // Gradients of keys and of values are computed a panel of columns at a time. Where there are registers for two, one
    // is computed while the one before is moved.
    static constexpr int kPassColumns = TileK::kPanelColumns;
    static constexpr int kPassesOfValues = TileV::kPanels;
    static constexpr int kPasses = TileV::kPanels + TileK::kPanels;
    static constexpr bool kPassesOverlap = HeadDim < 256;
    static_assert(TileV::kPanelColumns == kPassColumns, "passes take turns with registers");
};

// Tiles are aligned to the swizzle's pattern.
template <typename T>
struct alignas(1024) SharedOfBackward {
    uint8_t q[T::TileQ::kBytes];
    uint8_t dout[T::TileDout::kBytes];
    uint8_t k[T::kStages][T::TileK::kBytes];
    uint8_t v[T::kStages][T::TileV::kBytes];
    uint8_t ds[T::TileDs::kBytes];
    alignas(16) float terms[2][T::kTerms];  // of rows of queries: lse in exponents of 2, delta
    int places[T::kStages][64];             // rows of gradients of keys
    uint8_t bits[T::kStages][64];           // of keys: for which of the tokens that share the tile of queries they count
    // For each of four kinds of threads, which of its scores of a key belong to each token: a bit each.
    alignas(16) uint16_t scores_of_token[4][8];
    uint64_t q_full, q_empty;
    uint64_t full[T::kStages], empty[T::kStages];
    int keys[T::kStages];  // how many of a tile's keys there are, negative less one in the last tile of a list
};

}  // namespace magi::index
