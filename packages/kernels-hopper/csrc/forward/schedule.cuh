// SPDX-License-Identifier: Apache-2.0
// Which tile of queries a block computes next, and which boxes of keys that tile meets.
#pragma once

#include "params.cuh"

namespace magi::forward {

struct Item {
    int tile;        // of queries
    int first_row;   // of results of the part of the tile's keys, which lie one part after another
    int pack;        // of heads
    int first_run;
    int num_tiles;   // of keys
    int num_masked;
    int last_run;    // of a last tile of keys that ends with its first box, else -1
    int num_half;    // 1 if there is such a tile
};

// Item `number` in the order of work: sections of packs, in each the longest parts of tiles first, all its packs side by
// side.
__device__ __forceinline__ Item item_at(Params const& p, int number) {
    int const section = number / (p.num_tiles * p.packs_per_section);
    int const first_pack = section * p.packs_per_section;
    int const packs = min(p.packs_per_section, p.num_packs - first_pack);
    int const within = number - section * p.num_tiles * p.packs_per_section;
    int const row = p.order[within / packs];
    int const part = row / p.num_tiles_q, tile = row - part * p.num_tiles_q;
    int4 const header = p.tiles[row];
    return {tile, part * p.results.num_q, first_pack + within % packs, header.x, header.y, header.z, header.w, header.w >= 0};
}

// Walks through the boxes of a tile's runs.
template <int BoxN>
struct BoxCursor {
    int4 const* const runs;
    int next_run;
    int4 run = {0, 0, 0, 0};  // of the box last returned
    int key = 0;              // where the next box begins

    __device__ __forceinline__ BoxCursor(Params const& p, Item const& item) : runs(p.runs), next_run(item.first_run) {}

    // The first key of the next box.
    __device__ __forceinline__ int next() {
        if (key >= run.y) {
            run = __ldg(runs + next_run++);
            key = run.x;
        }
        int const box = key;
        key += BoxN;
        return box;
    }
};

}  // namespace magi::forward
