// SPDX-License-Identifier: Apache-2.0
// What the host gives the forward kernel; magi_kernels_hopper/forward.py has the same fields in the same order.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace magi::forward {

// What scores are made of.
struct Scoring {
    float scale;      // of products, positive
    float to_log2;    // from what the softmax is taken of to exponents of 2: log2(e), times scale without softcap
    float softcap;    // this one and the next are for kernels with softcap only
    float cap_slope;  // 2 log2(e) scale / softcap
};

// What a kernel writes.
struct Results {
    void* out;          // [num_q, num_heads, head_dim_v], of Element or float
    float* lse;         // [num_q, num_heads], with strides
    float* max_logits;  // [num_heads] or null; -inf before the launch
    int64_t lse_token, lse_head;  // elements from one to the next
    int num_q, num_heads;
    int out_is_float;   // out is float
    int merges;         // out and lse hold the result over other keys, to be merged with

    // Whether results are written over what is there, as elements, which the copy engine does.
    __device__ __forceinline__ bool stages_out() const { return !merges && !out_is_float; }
};

// A tile of queries holds `pack` neighboring query heads of one key head, and for each of them the same tokens, of which
// each consumer has `share_q`: its row r is of token r / pack and of head r % pack from its first. Rows after the last of
// them count for nothing.
//
// The keys of a tile may be cut into parts; then results are those of parts, in float: out [parts, num_q, ...], lse
// likewise.
//
// tiles:  for the first parts of all tiles of queries, then the second ones, and so on, (first run, number of tiles of
//         keys, how many of these are masked, run of the last box or -1); a tile of keys is two boxes. Masked tiles come first. Where a run of the last box is given, the last
//         tile ends with that, its first one, which begins the run if it needs a mask.
// runs:   (first key, end of keys, first piece, number of pieces or -1): boxes of keys one after another, the last one
//         cut off at the end; of a full run, which has -1 pieces, all pairs count. A run may begin at num_k, for one box
//         that nobody sees.
// pieces: pairs of (k0, k1, d0, d1), (q0, q1, 0, 0): query i sees key j if q0 <= i < q1, k0 <= j < k1, d0 <= j - i <= d1.
// order:  the rows of `tiles` that are there, the longest first.
struct Params {
    CUtensorMap q, k, v, out;
    Results results;
    Scoring scoring;
    uint32_t* counters;   // 2, zero before and after the launch
    int4 const* tiles;
    int4 const* runs;
    int4 const* pieces;
    int const* order;
    int pack, share_q;
    int packs_per_kv_head;      // query heads of a key head, divided by the pack
    int num_tiles;              // parts of tiles of queries
    int num_tiles_q;            // rows of `tiles` from one part to the next
    int num_packs;              // of heads
    int packs_per_section;      // that are computed together, so that their keys stay in the L2 cache
    float tolerance;            // by how much a score, before scale and cap, may exceed what exponentials are relative to
};

static_assert(sizeof(Params) == 768, "forward.py pads its structure to this size");

}  // namespace magi::forward
