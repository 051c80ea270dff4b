// SPDX-License-Identifier: Apache-2.0
// What the host gives the backward kernels; magi_kernels_hopper/backward_params.py has the same fields in the same order.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace magi::backward {

// How gradients are written: as elements, as floats, or added to floats.
enum OutMode : int { kElements, kFloats, kAddFloats };

// A tile of queries holds `1 << log2_pack` neighboring query heads of one key head, and for each of them the same
// tokens: row r is of token r >> log2_pack and of head r & ((1 << log2_pack) - 1) from the tile's first. Tiles are cut
// from token 0.
//
// tiles:  for each tile of keys (first run, number of runs, number of tiles of queries, first of its ranks).
// runs:   (first tile of queries, end, first piece, number of pieces or -1): of a full run, which has -1 pieces, all
//         pairs count.
// pieces: pairs of (q0, q1, d0, d1), (k0, k1, 0, 0): key j is seen by query i if k0 <= j < k1, q0 <= i < q1,
//         d0 <= i - j <= d1. Keys are counted as if all tiles were full: the first one of tile t is t * kTileN.
// keys:   of each tile (first, end, rests of the first consumer, of the second): in how many steps at the begin of each
//         pack, times 65536, and at its end no pair of a consumer's keys counts. With the first consumer's, kAwaited: the
//         gradients of the tile are among those that somebody waits for.
// items:  in the order of work (tile of keys, key head, first of its packs, number of packs). Where the packs of one tile
//         of keys and head are several items', these have as many each, and add up their gradients of keys and values
//         one after another, the first packs first.
// ranks:  for each tile of keys and each tile of queries that it meets, how many tiles of keys that come earlier in
//         `items` meet it; null if the order in which they add does not matter.
// adders: for each tile of queries, how many tiles of keys meet it.
struct Params {
    CUtensorMap q, dout, k, v;
    void* dk;             // [num_k, kv heads, head_dim], of Element or float
    void* dv;             // the same, of the values' head dim
    float* dq_sums;       // [packs][tiles of queries][parts][floats of a part], in the order of accumulators; see Traits
    float* row_terms;     // [packs][tiles of queries][2][terms of a tile]: lse in exponents of 2, then delta; see Traits
    int* counters;        // 4, zero before and after the launch
    int4 const* tiles;
    int4 const* runs;
    int4 const* pieces;
    int4 const* items;
    int const* ranks;
    int4 const* keys;
    int num_kv_heads;
    int log2_pack;
    int packs_per_kv_head;      // query heads of a key head, divided by the pack
    int num_tiles_q, num_items;
    float scale;                // of scores
    float to_log2;              // from products of queries and keys to exponents of 2
    float cap_slope, cap;       // of kernels with softcap: 2 log2(e) scale / softcap, log2(e) softcap
    int out_mode;               // of dk and dv, an OutMode
    int const* adders;
    void* dq;                   // [num_q, heads, head_dim]
    int* added;                 // [packs][tiles of queries][parts]: how many tiles of keys have added, 0 before the launch;
                                // or kClaimed
    int* complete;              // [packs * tiles of queries * parts]: 1 + parts to which all have added, in that order, or 0
    int num_q, num_packs;       // packs of all key heads
    float dq_scale;
    int dq_mode;
    int num_complete;           // parts to which some tile of keys adds
    float* partial;             // [tiles of keys][key heads][consumers][2][64 * head_dim], in the order of accumulators
    int* items_done;            // [tiles of keys][key heads][consumers]: how many items of the same keys; 0 before the launch
    int* awaited_done;          // how many consumers have written all that is awaited of a tile and head; 0 before the launch
    int* awaited_there;         // raised by one when all have
    int num_awaited;            // consumers of all tiles and heads; 0 if nobody waits
};

constexpr int kAwaited = 1 << 15;

static_assert(sizeof(Params) == 768, "backward_params.py pads its structure to this size");

// Before the backward kernel: per row of queries.
struct RowParams {
    void const* out;      // [num_q, heads, head dim of values]
    void const* dout;
    float const* lse;     // [num_q, heads], with strides; natural logarithm
    int64_t lse_token, lse_head;  // elements from one to the next
    float const* dlse;    // [num_q, heads] or null
    float* row_terms;     // these as in Params
    int *added, *complete, *items_done;
    int const* adders;
    void* dq;
    int num_q, num_heads;
    int log2_pack;
    int num_tiles_q;
    int num_items_done;
    int dq_mode;
};

}  // namespace magi::backward
