// SPDX-License-Identifier: Apache-2.0
// What the host gives the backward kernels; magi_kernels_hopper/backward_params.py has the same fields in the same order.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace magi::backward {

// A tile of queries holds `1 << log2_pack` neighboring query heads of one key head, and for each of them the same
// tokens: row r is of token r >> log2_pack and of head r & ((1 << log2_pack) - 1) from the tile's first. Tiles are cut
// from token 0.
//
// tiles:  for each tile of keys (first run, number of runs, number of tiles of queries, first of its ranks).
// runs:   (first tile of queries, end, first piece, number of pieces or -1): of a full run, which has -1 pieces, all
//         pairs count.
// pieces: pairs of (q0, q1, d0, d1), (k0, k1, 0, 0): key j is seen by query i if k0 <= j < k1, q0 <= i < q1,
//         d0 <= i - j <= d1.
// order:  tiles of keys, the longest first.
// ranks:  for each tile of keys and each tile of queries that it meets, how many tiles of keys that come earlier in
//         `order` meet it.
struct Params {
    CUtensorMap q, dout, k, v;
    void* dk;             // [num_k, kv heads, head_dim], of Element or float
    void* dv;             // the same
    float* dq_sums;       // [packs][tiles of queries][parts][floats of a part], in the order of accumulators; see Traits
    float* row_terms;     // [packs][tiles of queries][2][terms of a tile]: lse in exponents of 2, then delta; see Traits
    uint32_t* semaphores; // [packs][tiles of queries][parts], 0 before the launch; null if the order does not matter
    uint32_t* counters;   // 2, zero before and after the launch
    int4 const* tiles;
    int4 const* runs;
    int4 const* pieces;
    int const* order;
    int const* ranks;
    int num_k, num_kv_heads;
    int log2_pack;
    int packs_per_kv_head;      // query heads of a key head, divided by the pack
    int num_tiles_q, num_tiles_k;
    int heads_per_section;      // key heads that are computed together, so that their queries stay in the L2 cache
    float scale;                // of scores
    float to_log2;              // from products of queries and keys to exponents of 2
    float cap_slope, cap;       // of kernels with softcap: 2 log2(e) scale / softcap, log2(e) softcap
    int out_is_float;           // dk and dv are float
};

static_assert(sizeof(Params) == 768, "backward_params.py pads its structure to this size");

// Before and after the backward kernel: per row of queries.
struct RowParams {
    void const* out;      // [num_q, heads, head_dim]
    void const* dout;
    float const* lse;     // [num_q, heads], natural logarithm
    float const* dlse;    // or null
    float* dq_sums;
    float* row_terms;
    uint32_t* semaphores;
    void* dq;             // [num_q, heads, head_dim], of Element or float
    int num_q, num_heads;
    int log2_pack;
    int num_tiles_q;
    float scale;
    int dq_is_float;
};

}  // namespace magi::backward
