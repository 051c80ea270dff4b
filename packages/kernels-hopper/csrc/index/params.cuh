// SPDX-License-Identifier: Apache-2.0
// What the host gives the kernel of index attention; magi_kernels_hopper/index.py has the same fields in the same order.
#pragma once

#include "../forward/params.cuh"

namespace magi::index {

// Every query token has a list of keys for each key head: rows of k and v. A list ends at its first negative entry.
// A tile of queries is `pack` neighboring query heads of one key head, of one token.
struct Params {
    CUtensorMap q;
    forward::Results results;
    forward::Scoring scoring;
    uint8_t const* k;    // [num_k, kv heads, head_dim]
    uint8_t const* v;    // [num_k, kv heads, head_dim_v]
    int const* indices;  // [num_q, kv heads, longest]
    int64_t k_token_bytes, k_head_bytes;  // from one to the next
    int64_t v_token_bytes, v_head_bytes;
    int num_k, num_kv_heads;
    int longest;            // entries of a list, a multiple of 64
    int pack;
    int packs_per_kv_head;  // query heads of a key head, divided by the pack
    int padding[27];
};

static_assert(sizeof(Params) == 384, "index.py has a structure of this size");

}  // namespace magi::index
