// SPDX-License-Identifier: Apache-2.0
// What the blocks of a backward kernel keep in shared memory.
#pragma once

#include "schedule.cuh"
#include "traits.cuh"

namespace magi::backward {

// Probabilities on their way from one consumer of wide heads to the other: of each thread four words of each fragment.
template <typename T, bool Wide = T::kWide>
struct SharedProbabilities {
    uint4 p[2][T::kTileM / 16][128];
    uint64_t p_full[2], p_empty[2];
};
template <typename T>
struct SharedProbabilities<T, false> {};

// Where gradients of queries go: to those of a tile, counted over all packs; where the order matters, once as many tiles of
// keys have added to them as the rank says.
struct Target {
    int tile, rank;
};

// What each consumer has computed of them, on its way to the sums in device memory.
template <typename T, bool Exists = T::kDqShared>
struct SharedDq {
    alignas(16) float dq[kConsumers][T::kDqFloats];
    Target dq_target[kConsumers];  // tile -1: there are none left
    uint64_t dq_full[kConsumers], dq_empty[kConsumers];
};
template <typename T>
struct SharedDq<T, false> {
    bool writes_dq[kConsumers];  // whether a consumer is the first to add to a part
};

// What consumers of fine kernels exchange at the end of an item.
template <typename T, bool Exists = T::kFine>
struct SharedExchange {
    alignas(16) float exchanged[64 * T::kHeadDim];
};
template <typename T>
struct SharedExchange<T, false> {};

// Tiles are aligned to the swizzle's pattern.
template <typename T>
struct SharedTiles {
    alignas(1024) uint8_t k[T::TileK::kBytes];
    alignas(1024) uint8_t v[T::TileV::kBytes];
    alignas(1024) uint8_t q[T::kStages][T::TileQ::kBytes];
    alignas(1024) uint8_t dout[T::kStages][T::TileDout::kBytes];
    alignas(1024) uint8_t ds[2][T::kFine ? 16 : T::TileDs::kBytes];
};

template <typename T>
struct Shared : SharedTiles<T>, SharedDq<T>, SharedProbabilities<T>, SharedExchange<T> {
    alignas(16) float row_terms[T::kStages][2][T::kTerms];
    int4 step[T::kStages];  // first token, first piece, number of pieces or -1, tile counted over all packs
    int rank[T::kStages];   // of the tile of keys among those that meet the tile of queries
    Target ds_target[2];    // of gradients of queries
    alignas(16) int item[2][4];  // tile of keys or -1, key head, steps of a pack, packs
    int4 keys[2];                // of the items' tiles, as in Params
    uint64_t k_full, v_full, kv_empty;
    uint64_t q_full[T::kStages], q_empty[T::kStages];
    uint64_t dout_full[T::kStages], dout_empty[T::kStages];
    uint64_t ds_full[2], ds_empty[2];
    uint64_t item_full[2], item_empty[2];
};

}  // namespace magi::backward
