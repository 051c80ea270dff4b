// SPDX-License-Identifier: Apache-2.0
// Which tile of keys a block computes next, and which tiles of queries that tile meets.
#pragma once

#include "params.cuh"

namespace magi::backward {

struct Item {
    int tile;  // of keys, or -1: there is none left
    int kv_head;
    int steps;       // tiles of queries that it meets, of each pack
    int first_pack;  // of its head's
    int packs;

    __device__ __forceinline__ int num_steps() const { return steps * packs; }
    // Its place among the items of the same keys, and whether it is the last.
    __device__ __forceinline__ int number() const { return first_pack / packs; }
    __device__ __forceinline__ bool is_last(Params const& p) const { return first_pack + packs == p.packs_per_kv_head; }
};

// Keys of a tile, or from some place in it on; they may be none.
struct KeyRange {
    int first, end;
};

// The steps of each pack, at its begin and at its end, in which no pair of a consumer's counts.
struct Rests {
    int first, last;
};

// Item `number` in the order of work.
__device__ __forceinline__ Item item_at(Params const& p, int number) {
    int4 const item = __ldg(p.items + number);
    return {item.x, item.y, __ldg(p.tiles + item.x).z, item.z, item.w};
}

// Walks through the tiles of queries of an item: those of all its runs, the last ones first, once for each pack. Tiles of
// keys that work at the same time then meet the same tiles of queries at about the same time, so that these stay in the
// L2 cache, and so do the sums of their gradients; and tiles of keys that come earlier in a causal mask's order of work
// are earlier at every tile of queries.
struct Walk {
    Params const& p;
    int4 header;  // of the tile of keys
    int4 run;
    int4 following;  // the run after, which is read ahead
    int run_number;  // of its tile of keys
    int tile;        // of queries
    int pack;
    int left;  // tiles of this pack, with this one

    __device__ __forceinline__ Walk(Params const& p, Item const& item)
        : p(p),
          header(__ldg(p.tiles + item.tile)),
          run(__ldg(p.runs + header.x + header.y - 1)),
          run_number(header.y - 1),
          tile(run.y - 1),
          pack(item.kv_head * p.packs_per_kv_head + item.first_pack),
          left(header.z) {
        following = run_after();
    }

    __device__ __forceinline__ int number_after() const { return (run_number == 0 ? header.y : run_number) - 1; }
    __device__ __forceinline__ int4 run_after() const { return __ldg(p.runs + header.x + number_after()); }

    __device__ __forceinline__ void advance() {
        if (--left == 0) {  // the last run comes after the first one
            left = header.z;
            pack++;
        }
        if (--tile >= run.x) return;
        run = following;
        run_number = number_after();
        tile = run.y - 1;
        following = run_after();
    }

    // How many tiles of keys must have added to this tile's gradients before this one does, where the order matters.
    __device__ __forceinline__ int rank() const { return p.ranks == nullptr ? 0 : __ldg(p.ranks + header.w + left - 1); }
};

}  // namespace magi::backward
