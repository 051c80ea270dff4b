// SPDX-License-Identifier: Apache-2.0
// The threads of a few blocks as fibers of one host thread, which take turns in a random order, warp by warp: what a kernel
// needs of CUDA C++ besides PTX. A fiber that waits yields, so that a kernel which waits for ever is found.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <ucontext.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <random>
#include <vector>

#undef __device__
#undef __forceinline__
#define __device__
#define __forceinline__ inline

namespace emulator {

constexpr int kSharedBytes = 227 << 10;

// Where `count` threads wait for each other.
struct Meeting {
    int came = 0;
    long generation = 0;
};

// Of a product 64 by `columns` by 16: where operands are, and of each thread the accumulators and the left fragment, which
// the compiler keeps in its registers for as long as it is needed.
struct Product {
    int columns;
    bool left_in_registers, left_transposed, right_transposed, adds;
    float (*number)(uint16_t);  // of an element's bits
    uint64_t left, right;
    float* sums[128];
    uint32_t fragments[128][4];
};

// Products of a warpgroup that have been started; they are done when they are waited for, as late as can be.
struct Warpgroup {
    Meeting meeting;
    Product next;
    std::deque<Product> started;
    std::deque<int> groups;  // how many products each has
    int uncommitted = 0;
};

struct Warp {
    Meeting meeting;
    uint64_t words[32][5];  // what its threads show each other
};

// A barrier of csrc/ptx/mbarrier.cuh.
struct PhaseBarrier {
    int arrivals = 0, came = 0;
    long bytes = 0;
    int phase = 0;
};

struct Block {
    uint8_t* shared;
    dim3 index;
    std::map<uint32_t, Meeting> named;
    std::map<void const*, PhaseBarrier> barriers;
    std::vector<Warp> warps;
    std::vector<Warpgroup> warpgroups;
};

struct Fiber {
    ucontext_t context;
    Block* block;
    dim3 thread;
    bool done;
};

// Memory, and where it is copied to when a word is raised that streams wait for.
struct Watched {
    void const* from;
    void* to;
    size_t bytes;
};

extern Fiber* current;
extern std::vector<Watched> watched;
extern dim3 grid;
extern bool late;  // whether products are done when they are waited for, or when they are committed
extern bool failed;
extern long idle;  // turns since anything happened

// Runs blocks of a kernel at the same time, from number `first` on; false if threads wait for ever.
bool launch(int first, int blocks, int threads, int seed, std::function<void()> const& kernel);
void yield();
void fail(char const* why);

inline void meet(Meeting& meeting, int count) {
    long const generation = meeting.generation;
    if (++meeting.came == count) {
        meeting.came = 0, meeting.generation++, idle = 0;
        return;
    }
    while (meeting.generation == generation) yield();
}

inline int lane() { return current->thread.x % 32; }
inline Warp& warp() { return current->block->warps[current->thread.x / 32]; }
inline Warpgroup& warpgroup() { return current->block->warpgroups[current->thread.x / 128]; }

template <typename Value>
Value from_lane(Value value, int source) {
    std::memcpy(warp().words[lane()], &value, sizeof(Value));
    meet(warp().meeting, 32);
    std::memcpy(&value, warp().words[source % 32], sizeof(Value));
    meet(warp().meeting, 32);
    return value;
}

template <typename Value, typename Change>
Value atomically(Value* target, Change change) {
    Value const before = *target;
    *target = change(before);
    idle = 0;
    return before;
}

}  // namespace emulator

#define threadIdx (emulator::current->thread)
#define blockIdx (emulator::current->block->index)
#define gridDim (emulator::grid)

template <typename Value>
Value __ldg(Value const* source) {
    return *source;
}
template <typename Value>
Value __shfl_sync(uint32_t, Value value, int source) {
    return emulator::from_lane(value, source);
}
template <typename Value>
Value __shfl_xor_sync(uint32_t, Value value, int bits) {
    return emulator::from_lane(value, emulator::lane() ^ bits);
}
inline void __syncwarp() { emulator::meet(emulator::warp().meeting, 32); }
inline void __syncthreads() {
    auto& block = *emulator::current->block;
    emulator::meet(block.named[0], 32 * block.warps.size());
}
inline void __threadfence() {}
template <typename Value>
Value atomicAdd(Value* target, int value) {
    return emulator::atomically(target, [&](Value before) { return before + value; });
}
template <typename Value>
Value atomicExch(Value* target, int value) {
    return emulator::atomically(target, [&](Value) { return value; });
}
// Used by none of the kernels here.
int atomicMax(int*, int);
uint32_t atomicMin(uint32_t*, uint32_t);
int __float_as_int(float);
uint32_t __float_as_uint(float);
inline uint32_t atomicInc(uint32_t* target, uint32_t last) {
    return emulator::atomically(target, [&](uint32_t before) { return before >= last ? 0 : before + 1; });
}
template <typename A, typename B>
auto min(A a, B b) {
    return a < b ? a : b;
}
template <typename A, typename B>
auto max(A a, B b) {
    return a > b ? a : b;
}
