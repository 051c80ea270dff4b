// SPDX-License-Identifier: Apache-2.0
// csrc/ptx on the host, but for matrices and products. The copy engine is done at once.
#pragma once

#include "grid.h"

namespace magi::ptx {

inline uint32_t shared_address(void const* pointer) {
    return static_cast<uint8_t const*>(pointer) - emulator::current->block->shared;
}
template <typename Value>
Value* at_shared(uint32_t address) {
    if (address + sizeof(Value) > emulator::kSharedBytes) emulator::fail("an address is beyond shared memory");
    return reinterpret_cast<Value*>(emulator::current->block->shared + address);
}

inline emulator::PhaseBarrier& phases_of(uint64_t* barrier) { return emulator::current->block->barriers[barrier]; }
inline void update(uint64_t* barrier, int arrivals, long bytes) {
    auto& phases = phases_of(barrier);
    phases.came += arrivals, phases.bytes += bytes;
    if (phases.came > phases.arrivals) emulator::fail("more arrivals than a phase has");
    if (phases.came == phases.arrivals && phases.bytes == 0) phases.came = 0, phases.phase ^= 1;
    emulator::idle = 0;
}
inline void mbarrier_init(uint64_t* barrier, uint32_t arrivals) { phases_of(barrier) = {static_cast<int>(arrivals)}; }
inline void fence_mbarrier_init() {}
constexpr uint32_t kArrivalsOfWarp = 1;
inline void mbarrier_arrive(uint64_t* barrier) { update(barrier, 1, 0); }
inline void mbarrier_arrive_warp(uint64_t* barrier) {
    __syncwarp();
    if (emulator::lane() == 0) mbarrier_arrive(barrier);
}
inline void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) { update(barrier, 1, bytes); }
inline bool mbarrier_test_wait_parity(uint64_t* barrier, uint32_t parity) {
    emulator::yield();
    return phases_of(barrier).phase != static_cast<int>(parity);
}
inline void mbarrier_try_wait_parity(uint64_t* barrier, uint32_t parity) {
    while (!mbarrier_test_wait_parity(barrier, parity)) continue;
}

inline void barrier_sync(uint32_t id, uint32_t threads) { emulator::meet(emulator::current->block->named[id], threads); }
inline void barrier_arrive(uint32_t id, uint32_t threads) {
    auto& meeting = emulator::current->block->named[id];
    if (++meeting.came == static_cast<int>(threads)) meeting.came = 0, meeting.generation++;
    emulator::idle = 0;
}
template <uint32_t Registers>
void setmaxnreg_inc() {}
template <uint32_t Registers>
void setmaxnreg_dec() {}
inline bool elect_sync() { return emulator::lane() == 0; }

inline void cp_async_bulk_load(void* target, void const* source, uint32_t bytes, uint64_t* barrier) {
    std::memcpy(target, source, bytes);
    update(barrier, 0, -static_cast<long>(bytes));
}
inline void cp_async_bulk_store(void* target, void const* source, uint32_t bytes) { std::memcpy(target, source, bytes); }
inline void cp_reduce_async_bulk_add(float* target, void const* source, uint32_t bytes) {
    for (uint32_t i = 0; i < bytes / sizeof(float); i++) target[i] += static_cast<float const*>(source)[i];
}
inline void cp_async_bulk_commit_group() {}
template <int Pending>
void cp_async_bulk_wait_group_read() {
    emulator::yield();
}
template <int Pending>
void cp_async_bulk_wait_group() {
    emulator::yield();
}
inline void fence_proxy_async_shared() { emulator::yield(); }
inline void fence_proxy_async_global() {}

// What tests/hopper/test_backward_emulated.py writes in place of a tensor's map.
struct Map {
    uint16_t const* data;
    int64_t tokens, heads, dim, token_stride, head_stride;
    int box_dim, box_heads, box_tokens;
};
enum class CacheHint { kEvictNormal, kEvictFirst, kEvictLast };
inline void cp_async_bulk_tensor_3d(void* target, CUtensorMap const* tensor_map, uint64_t* barrier, int dim, int head,
                                    int token, CacheHint) {
    Map const& map = *reinterpret_cast<Map const*>(tensor_map);
    int place = 0;
    for (int t = token; t < token + map.box_tokens; t++) {
        for (int h = head; h < head + map.box_heads; h++) {
            for (int d = dim; d < dim + map.box_dim; d++) {
                bool const inside = t >= 0 && h >= 0 && d >= 0 && t < map.tokens && h < map.heads && d < map.dim;
                uint32_t const plain = shared_address(target) + 2 * place++;
                *at_shared<uint16_t>(plain ^ (plain >> 3 & (map.box_dim == 64 ? 0x70 : 0x30))) =
                    inside ? map.data[t * map.token_stride + h * map.head_stride + d] : 0;
            }
        }
    }
    update(barrier, 0, -2L * place);
}

inline void prefetch_tensormap(CUtensorMap const*) {}
inline void cp_async_bulk_prefetch_tensor_3d(CUtensorMap const*, int, int, int) {}
// Used by none of the kernels here.
void cp_async_bulk_tensor_store_3d(CUtensorMap const*, void const*, int, int, int);
void stmatrix_x4(uint32_t, uint32_t const (&)[4]);

inline int4 load_to_keep(int4 const* address) { return *address; }
inline void store_shared(uint32_t address, float x, float y, float z, float w) {
    *at_shared<float4>(address) = make_float4(x, y, z, w);
}
inline int load_acquire(int const* address) {
    emulator::yield();
    return *address;
}
inline void store_release(int* address, int value) { *address = value, emulator::idle = 0; }
inline int add_acquire_release(int* address, int value) { return atomicAdd(address, value); }
inline void add_release_system(int* address, int value) {
    for (auto const& [from, to, bytes] : emulator::watched) std::memcpy(to, from, bytes);
    atomicAdd(address, value);
    emulator::idle = 0;
}
inline int compare_swap_acquire(int* address, int expected, int value) {
    return emulator::atomically(address, [&](int before) { return before == expected ? value : before; });
}
inline int wait_until_set(int const* address) {
    while (load_acquire(address) == 0) continue;
    return *address;
}
inline float4 load_once(float4 const* address) { return *address; }
inline void discard_l2(void const* address) { std::memset(const_cast<void*>(address), 0xFF, 128); }  // NaN from now on
inline void red_add(float* target, float a, float b) { target[0] += a, target[1] += b; }
inline void red_add(float* target, float a, float b, float c, float d) { red_add(target, a, b), red_add(target + 2, c, d); }

}  // namespace magi::ptx
