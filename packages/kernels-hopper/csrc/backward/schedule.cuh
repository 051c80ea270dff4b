// SPDX-License-Identifier: Apache-2.0
// Which tile of keys a block computes next, and which tiles of queries that tile meets.
#pragma once

#include "params.cuh"

namespace magi::backward {

struct Item {
    int tile;  // of keys, or -1: there is none left
    int kv_head;
    int num_steps;  // tiles of queries that it meets, over all packs of its head
};

// Item `number` in the order of work: sections of heads, in each the longest tiles first, all its heads side by side.
__device__ __forceinline__ Item item_at(Params const& p, int number) {
    int const items_per_section = p.num_tiles_k * p.heads_per_section;
    int const section = number / items_per_section;
    int const first_head = section * p.heads_per_section;
    int const heads = min(p.heads_per_section, p.num_kv_heads - first_head);
    int const within = number - section * items_per_section;
    int const tile = __ldg(p.order + within / heads);
    return {tile, first_head + within % heads, __ldg(p.tiles + tile).z * p.packs_per_kv_head};
}

// Walks through the tiles of queries of an item: those of all its runs, the last ones first, once for each pack. Neighboring
// tiles of keys then meet the same tiles of queries at about the same time, so that these stay in the L2 cache; and tiles
// of keys that come earlier in a causal mask's order of work are earlier at every tile of queries.
struct Walk {
    Params const& p;
    int4 header;  // of the tile of keys
    int4 run;
    int4 following;  // the run after, which is read ahead
    int run_number;  // of its tile of keys
    int tile;        // of queries
    int pack;
    int left;  // tiles of this pack, with this one

    __device__ __forceinline__ Walk(Params const& p, int tile_k, int kv_head)
        : p(p),
          header(__ldg(p.tiles + tile_k)),
          run(__ldg(p.runs + header.x + header.y - 1)),
          run_number(header.y - 1),
          tile(run.y - 1),
          pack(kv_head * p.packs_per_kv_head),
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

    // How many tiles of keys add to this tile's gradients before this one.
    __device__ __forceinline__ int rank() const { return __ldg(p.ranks + header.w + left - 1); }
};

}  // namespace magi::backward
