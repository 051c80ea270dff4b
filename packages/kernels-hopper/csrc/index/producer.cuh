// SPDX-License-Identifier: Apache-2.0
// The warpgroup that gathers keys and values.
#pragma once

#include "../forward/softmax.cuh"
#include "../ptx/barrier.cuh"
#include "../ptx/cp_async.cuh"
#include "../ptx/cp_async_bulk.cuh"
#include "../ptx/cp_async_bulk_tensor.cuh"
#include "../ring.cuh"
#include "params.cuh"
#include "traits.cuh"

namespace magi::index {

constexpr int kProducers = 128;  // threads

// Tiles of queries in order of work: pack by pack of heads, so that keys of one head stay in the L2 cache.
struct Item {
    int tile, pack;  // of tokens, of heads
    __device__ __forceinline__ Item(Lists const& p, int64_t number)
        : tile(static_cast<int>(number % p.num_tiles)), pack(static_cast<int>(number / p.num_tiles)) {}
    __device__ __forceinline__ int kv_head(Lists const& p) const { return pack / p.packs_per_kv_head; }
    __device__ __forceinline__ QueryRow row(Lists const& p, int row) const {
        return {p, tile * p.tokens, pack * p.pack, row};
    }
};

// By one thread.
template <typename T>
__device__ __forceinline__ void init_barriers(typename T::Shared& s) {
    ptx::mbarrier_init(&s.q_full, 1);
    ptx::mbarrier_init(&s.q_empty, 4 * ptx::kArrivalsOfWarp);
    for (int i = 0; i < T::kStages; i++) {
        ptx::mbarrier_init(&s.full[i], kProducers);
        ptx::mbarrier_init(&s.empty[i], 4 * ptx::kArrivalsOfWarp);
    }
    ptx::fence_mbarrier_init();
}

// In the backward pass gradients of outputs come with queries, and where to add those of keys with keys.
template <typename T>
struct Producer {
    using Params = typename T::Params;
    using Shared = typename T::Shared;
    Params const& p;
    Lists const& lists;
    Shared& s;
    RingPlace<T::kStages> place;
    RingPlace<1> q_place;
    int signaled = 0, started = 0;  // tiles
    int indices[2];                 // of a tile, those of the lane and of 32 later
    uint8_t bits[2];                // of tokens that share the tile of queries

    __device__ __forceinline__ Producer(Params const& p, Shared& s) : p(p), lists(p.lists), s(s) {}

    __device__ __forceinline__ void read_indices(int const* list) {
        indices[0] = __ldg(list + threadIdx.x % 32);
        indices[1] = __ldg(list + threadIdx.x % 32 + 32);
        if (lists.bits != nullptr) {
            uint8_t const* const of_list = lists.bits + (list - lists.indices) + threadIdx.x % 32;
            bits[0] = __ldg(of_list);
            bits[1] = __ldg(of_list + 32);
        }
    }

    // How many of the tile's indices come before the first negative one.
    __device__ __forceinline__ int count_keys() const {
        uint32_t const low = __ballot_sync(~0u, indices[0] < 0), high = __ballot_sync(~0u, indices[1] < 0);
        return low != 0 ? __ffs(low) - 1 : high != 0 ? __ffs(high) + 31 : T::kTileN;
    }

    // Stops the program, as torch's own indexing does, rather than read beyond the keys.
    __device__ __forceinline__ void check(int keys) const {
        int const lane = threadIdx.x % 32;
        bool const inside = (lane >= keys || indices[0] < lists.num_k) && (lane + 32 >= keys || indices[1] < lists.num_k);
        if (!inside) asm volatile("trap;");
    }

    // Starts to copy the rows of k or v that the tile's indices name: 8 threads a row, 128 bytes of it at a time.
    template <typename Tile>
    __device__ __forceinline__ void gather(uint8_t* target, uint8_t const* source, int64_t token_bytes, int keys) {
        constexpr int kBytesPerRow = Tile::kColumns * kBytesPerElement;
        constexpr int kRows = kProducers / 8;  // at a time, a multiple of those after which the swizzle repeats
        int const first_row = threadIdx.x / 8, byte = threadIdx.x % 8 * 16;
        uint32_t const place = ptx::shared_address(target) + Tile::offset(first_row, byte / kBytesPerElement);
#pragma unroll
        for (int row = 0; row < T::kTileN; row += kRows) {
            int const key = __shfl_sync(~0u, indices[row / 32], row % 32 + first_row);
            uint8_t const* const from = source + key * token_bytes + byte;
#pragma unroll
            for (int i = 0; i < kBytesPerRow; i += 128) {
                if (i + 128 <= kBytesPerRow || byte < kBytesPerRow - i) {
                    ptx::cp_async_16(place + row * Tile::kSwizzleBytes + i / Tile::kSwizzleBytes * Tile::kPanelBytes,
                                     from + i, row + first_row < keys);
                }
            }
        }
    }

    // Starts to load the rows of a tile of queries, or of what is shaped like it.
    template <typename Tile>
    __device__ __forceinline__ void load_rows(uint8_t* target, CUtensorMap const& map, Item const& item) {
#pragma unroll
        for (int panel = 0; panel < Tile::kPanels; panel++) {
            ptx::cp_async_bulk_tensor_3d(target + panel * Tile::kPanelBytes, &map, &s.q_full, panel * Tile::kPanelColumns,
                                         item.pack * lists.pack, item.tile * lists.tokens,
                                         ptx::CacheHint::kEvictFirst);
        }
    }

    // By one warp.
    __device__ __forceinline__ void load_queries(Item const& item) {
        int const lane = threadIdx.x % 32;
        if constexpr (T::kDifferentiates) {
            float of_rows[2][2];  // of this row and of 32 later
#pragma unroll
            for (int i = 0; i < 2; i++) {
                QueryRow const row = item.row(lists, lane + 32 * i);
                of_rows[i][0] = row.inside ? __ldg(p.lse + row.index(lists)) : INFINITY;
                of_rows[i][1] = row.inside ? __ldg(p.delta + row.index(lists)) : 0;
            }
            ptx::mbarrier_try_wait_parity(&s.q_empty, q_place.parity() ^ 1);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                s.terms[0][T::term_of(lane + 32 * i)] = of_rows[i][0];
                s.terms[1][T::term_of(lane + 32 * i)] = of_rows[i][1];
            }
            __syncwarp();
            if (lane == 0) {
                constexpr int kBytes = (T::kHeadDim + T::kHeadDimV) * kBytesPerElement;
                ptx::mbarrier_arrive_expect_tx(&s.q_full, lists.num_rows() * kBytes);
                load_rows<typename T::TileQ>(s.q, p.q, item);
                load_rows<typename T::TileDout>(s.dout, p.dout, item);
            }
        } else if (lane == 0) {
            ptx::mbarrier_try_wait_parity(&s.q_empty, q_place.parity() ^ 1);
            ptx::mbarrier_arrive_expect_tx(&s.q_full, lists.num_rows() * T::kHeadDim * kBytesPerElement);
            load_rows<typename T::TileQ>(s.q, p.q, item);
        }
        __syncwarp();
    }

    // Which of the tokens that share the tile of queries the tile's entries are of.
    __device__ __forceinline__ void tell_tokens(int stage) {
        s.bits[stage][threadIdx.x % 32] = bits[0];
        s.bits[stage][threadIdx.x % 32 + 32] = bits[1];
    }

    // Which rows of gradients the tile's entries, from entry `first` of all lists on, have.
    __device__ __forceinline__ void tell_places(int stage, int64_t first, Item const& item) {
        int const lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int place = indices[i] * lists.num_kv_heads + item.kv_head(lists);
            if (p.places != nullptr) {
                place = __ldg(p.places + first + lane + 32 * i) * lists.packs_per_kv_head +
                        item.pack % lists.packs_per_kv_head;
            }
            s.places[stage][lane + 32 * i] = place;
        }
    }

    // Tells the consumer of a tile all of whose copies this thread has waited for.
    __device__ __forceinline__ void signal() {
        ptx::fence_proxy_async_shared();
        ptx::mbarrier_arrive(&s.full[signaled % T::kStages]);
        signaled++;
    }

    // A list's tiles; that of an empty list is one tile without keys.
    __device__ __forceinline__ void load(Item const& item) {
        int const kv_head = item.kv_head(lists);
        int const* list =
            lists.indices + (static_cast<int64_t>(item.tile) * lists.num_kv_heads + kv_head) * lists.longest;
        int const* const end = list + lists.longest;
        uint8_t const* const k = lists.k + kv_head * lists.k_head_bytes;
        uint8_t const* const v = lists.v + kv_head * lists.v_head_bytes;
        read_indices(list);
        int keys = count_keys();
        bool is_first = true, is_last;
        do {
            check(keys);
            int const stage = place.stage();
            ptx::mbarrier_try_wait_parity(&s.empty[stage], place.parity() ^ 1);
            place.advance();
            gather<typename T::TileK>(s.k[stage], k, lists.k_token_bytes, keys);
            gather<typename T::TileV>(s.v[stage], v, lists.v_token_bytes, keys);
            ptx::cp_async_commit_group();
            if (threadIdx.x < 32) {
                if (lists.bits != nullptr) tell_tokens(stage);
                if constexpr (T::kDifferentiates) tell_places(stage, list - lists.indices, item);
            }
            int const these = keys;
            list += T::kTileN;
            is_last = these < T::kTileN || list == end;
            if (!is_last) read_indices(list);
            // The tile before has come by now, or will have soon. Its item's queries make room only once it is computed.
            if (started++ > signaled) {
                ptx::cp_async_wait_group<1>();
                signal();
            }
            if (!is_last) {
                keys = count_keys();
                is_last = keys == 0;
            }
            if (threadIdx.x == 0) s.keys[stage] = is_last ? ~these : these;
            if (is_first) {
                if (threadIdx.x < 32) load_queries(item);
                q_place.advance();
                is_first = false;
            }
        } while (!is_last);
    }

    __device__ __forceinline__ void run() {
        int64_t const num_items = lists.num_items();
        for (int64_t number = blockIdx.x; number < num_items; number += gridDim.x) load(Item(lists, number));
        ptx::cp_async_wait_group<0>();
        if (started > signaled) signal();
    }
};

}  // namespace magi::index
