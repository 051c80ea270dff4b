// SPDX-License-Identifier: Apache-2.0
// What the host gives the kernel of index attention; magi_kernels_hopper/index.py has the same fields in the same order.
#pragma once

#include "../forward/params.cuh"

namespace magi::index {

// Every query token has a list of keys for each key head: rows of k and v. A list ends at its first negative entry.
// A tile of queries is `pack` neighboring query heads of one key head, of one token or of several neighboring ones whose
// lists were united: then each entry has a bit for each of the tokens.
struct Lists {
    uint8_t const* k;     // [num_k, kv heads, head_dim]
    uint8_t const* v;     // [num_k, kv heads, head_dim_v]
    int const* indices;   // [tiles of tokens, kv heads, longest]
    uint8_t const* bits;  // the same, or null if a tile has one token
    int64_t k_token_bytes, k_head_bytes;  // from one to the next
    int64_t v_token_bytes, v_head_bytes;
    int num_q, num_k, num_kv_heads;
    int longest;            // entries of a list, a multiple of 64
    int pack;
    int packs_per_kv_head;  // query heads of a key head, divided by the pack
    int tokens;             // of a tile
    int num_tiles;          // of tokens

    __device__ __forceinline__ int64_t num_items() const {
        return static_cast<int64_t>(num_tiles) * num_kv_heads * packs_per_kv_head;
    }
    __device__ __forceinline__ int num_heads() const { return num_kv_heads * packs_per_kv_head * pack; }
    __device__ __forceinline__ int num_rows() const { return pack * tokens; }  // of a tile
};

// A row of a tile: token, and query head.
struct QueryRow {
    int token, head;
    bool inside;

    // Row `row` of the tile that begins at a token and a head.
    __device__ __forceinline__ QueryRow(Lists const& p, int first_token, int first_head, int row)
        : token(first_token + row / p.pack), head(first_head + row % p.pack),
          inside(row < p.num_rows() && token < p.num_q) {}
    __device__ __forceinline__ int64_t index(Lists const& p) const {
        return static_cast<int64_t>(token) * p.num_heads() + head;
    }
};

struct Params {
    CUtensorMap q;
    Lists lists;
    forward::Results results;
    forward::Scoring scoring;
};

static_assert(sizeof(Params) == 384, "index.py pads its structure to this size");

// Gradients of keys and values come from the lists of many queries: either they are added up as they come, or each
// entry of a list has rows of its own, which are added up afterwards, in a fixed order.
struct BackwardParams {
    CUtensorMap q, dout;
    Lists lists;
    int const* places;  // as Lists::indices: rows of gradients for each entry, times the packs; or null
    float const* lse;   // [num_q, heads], in exponents of 2; +inf where there is no key
    float const* delta; // [num_q, heads]
    void* dq;           // [num_q, heads, head_dim], of Element
    float* dk;          // [rows, head_dim]: without places [num_k, kv heads], zero before; columns as column_of has them
    float* dv;          // [rows, head_dim_v]
    float to_log2;      // from products of queries and keys to exponents of 2
    float cap_slope, cap;  // of kernels with softcap: 2 log2(e) scale / softcap, log2(e) softcap
    float dq_scale;
};

static_assert(sizeof(BackwardParams) == 512, "index_backward.py pads its structure to this size");

// Before both kernels, where tokens share tiles: unites their lists, in the order of keys.
struct UniteParams {
    int const* indices;  // [num_q, kv heads, longest]
    int* united;         // [tiles, kv heads, united_longest], Lists::indices
    uint8_t* bits;       // Lists::bits
    int num_q, num_k, num_kv_heads;
    int longest, united_longest;
    int tokens;  // of a tile, at most 8
    int window;  // keys that fit shared memory, a byte each
};

// Before the backward kernel: terms of each row of queries.
struct TermsParams {
    void const* out;    // [num_rows, head_dim_v]
    void const* dout;
    float const* lse;   // [num_rows], natural logarithm
    float const* dlse;  // or null
    float* lse_terms;   // [num_rows], as BackwardParams has them
    float* delta;
    int64_t num_rows;
};

// After it, where entries have rows of their own: adds up those of each key, one after another.
struct SumParams {
    float const* dk;      // [entries, head_dim]
    float const* dv;      // [entries, head_dim_v]
    int64_t const* first; // [num_rows + 1]: the first entry of each row of keys, counted without packs
    float* dk_sums;       // [num_rows, head_dim]
    float* dv_sums;       // [num_rows, head_dim_v]
    int num_rows;
    int packs;            // rows of an entry
};

// At last: sums to elements.
struct FinishParams {
    float const* dk_sums;  // [num_rows, head_dim]
    float const* dv_sums;  // [num_rows, head_dim_v]
    void* dk;              // of Element
    void* dv;
    float dk_scale;
    int num_rows;
};

}  // namespace magi::index
