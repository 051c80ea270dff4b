// SPDX-License-Identifier: Apache-2.0
// Sizes of a backward kernel, and who computes what. Can be evaluated on the host.
#pragma once

#include "../layout.cuh"

namespace magi::backward {

// A place in a tile of gradients of queries.
struct DqPlace {
    int row, column;
};

constexpr int kConsumers = 2;  // warpgroups that compute
constexpr int kThreads = 128 * (kConsumers + 1);
// The first of two named barriers each, one for each consumer; 0 is __syncthreads().
constexpr uint32_t kOwnBarrier = 1, kTurnBarrier = kOwnBarrier + kConsumers;

// HeadDim is that of queries and keys, HeadDimV that of values and outputs. The other sizes are chosen by measurement;
// variants.py has those of each kernel.
//   TileM:  rows of queries of a tile
//   Stages: tiles of queries, and as many of the outputs' gradients, in shared memory
//   Fine:   whether it is for masks of small blocks
template <int HeadDim, int HeadDimV, typename Element_, bool Softcap, int TileM, int Stages, bool Fine = false>
struct Traits {
    using Element = Element_;
    static constexpr int kHeadDim = HeadDim, kHeadDimV = HeadDimV;
    static constexpr bool kSoftcap = Softcap;
    static constexpr int kTileM = TileM;
    static constexpr int kStages = Stages;

    // Wide heads leave no registers for the gradients of both 64 keys and 64 values: of one tile of keys, one consumer
    // computes those of values, the other those of keys. Otherwise each has keys of its own.
    static constexpr bool kWide = HeadDim > 128;
    // Fine tiles have few keys too, and each consumer all of them, with queries of its own, whose gradients another kernel
    // computes.
    static constexpr bool kFine = Fine;
    static constexpr int kTileN = kWide || kFine ? 64 : 64 * kConsumers;
    static_assert(kWide || HeadDimV == HeadDim, "consumers that have both gradients have them alike");
    static_assert(!(kWide && kFine), "consumers lack registers for both gradients of wide heads");

    // More rows of queries than a product has: then gradients of queries are computed transposed.
    static constexpr bool kTall = kTileM > 64;
    static_assert(!kTall || (HeadDim == 128 && !kFine), "a consumer has 64 columns of gradients of queries");

    using TileQ = PanelTile<kTileM, HeadDim>;
    using TileDout = PanelTile<kTileM, HeadDimV>;
    using TileK = PanelTile<kTileN, HeadDim>;
    using TileV = PanelTile<kTileN, HeadDimV>;
    using TileDs = PanelTile<kTileM, kTileN>;  // queries by keys

    // A thread's accumulators belong to every fourth pair of rows of queries. Terms of rows lie in the order in which the
    // four kinds of threads read them, with gaps that keep them apart in the memory's banks.
    static constexpr int kTermStride = kTileM / 4 + 4;
    static constexpr int kTerms = 4 * kTermStride;
    MAGI_HOST_DEVICE static constexpr int term_of(int row) { return row % 8 / 2 * kTermStride + row / 8 * 2 + row % 2; }
    static_assert(kTileM / 4 <= 32, "a key's mask must fit a word");

    // The gradients of a tile of queries are computed by one consumer, and those of the next one by the other; or, where
    // that takes too many registers, each computes half of the columns. Half of three panels is a whole one and half of
    // the one in the middle. Half of four takes two passes.
    static constexpr bool kDqAlternates = HeadDim < 128;
    static constexpr int kDqParts = kDqAlternates ? 1 : kConsumers;
    static constexpr int kDqColumns = HeadDim / kDqParts;  // of a part
    static constexpr int kDqHalf = kDqColumns % TileK::kPanelColumns;
    static constexpr int kDqPasses = kDqColumns > 96 ? 2 : 1;
    static constexpr int kDqWhole = (kDqColumns - kDqHalf) / kDqPasses;  // of a pass
    static constexpr int kDqFloats = kTileM * kDqColumns;
    static constexpr int kDqRegisters = kDqFloats / 128 / kDqPasses;  // of a thread
    static_assert(kDqPasses == 1 || kDqHalf == 0, "passes are of whole panels");

    // Sums of gradients of queries are added to by the copy engine, from shared memory, where there is room.
    static constexpr bool kDqShared = kDqPasses == 1 && !kFine;

    // The first of a part's columns in whole panels, and of the others.
    MAGI_HOST_DEVICE static constexpr int dq_whole_column(int part) { return (kDqPasses * kDqWhole + 2 * kDqHalf) * part; }
    MAGI_HOST_DEVICE static constexpr int dq_half_column(int part) { return kDqWhole + kDqHalf * part; }

    // Where in the tile accumulator i of a part, counted over the passes, belongs.
    MAGI_HOST_DEVICE static constexpr DqPlace dq_place(int part, int thread, int i) {
        int const pass = i / kDqRegisters, row = accumulator_row(thread, i);
        i %= kDqRegisters;
        if (kTall) return {accumulator_column(thread, i), dq_whole_column(part) + row};
        if (i < kDqWhole / 2) return {row, dq_whole_column(part) + pass * kDqWhole + accumulator_column(thread, i)};
        return {row, dq_half_column(part) + accumulator_column(thread, i - kDqWhole / 2)};
    }
};

}  // namespace magi::backward
