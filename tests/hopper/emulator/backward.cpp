// SPDX-License-Identifier: Apache-2.0
// csrc/backward as a library of the host, for tests/hopper/test_backward_emulated.py.
#include "backward/kernel.cuh"

#include "backward/rows.cuh"
#if MAGI_FINE
#include "backward/queries.cuh"
#endif
#include "grid.h"

#include <algorithm>
#include <cstdio>

namespace emulator {

Fiber* current;
dim3 grid;
bool late, failed;
long idle;
std::vector<Watched> watched;

namespace {
ucontext_t scheduler;
std::function<void()> kernel_of_fibers;
constexpr int kStackBytes = 64 << 10;
constexpr long kMostIdle = 3'000'000;

void start_fiber() {
    kernel_of_fibers();
    current->done = true;
    yield();
}
}  // namespace

void yield() { swapcontext(&current->context, &scheduler); }

void fail(char const* why) {
    std::fprintf(stderr, "%s\n", why);
    failed = true;
    while (true) yield();
}

bool launch(int first, int blocks, int threads, int seed, std::function<void()> const& kernel) {
    std::mt19937 random(seed);
    std::vector<uint8_t> shared(blocks * size_t{kSharedBytes} + 1024, 0xFF);  // NaN where nothing has been written
    std::vector<uint8_t> stacks(blocks * size_t{kStackBytes} * threads);
    uint8_t* const aligned = shared.data() + (1024 - reinterpret_cast<uintptr_t>(shared.data()) % 1024) % 1024;
    std::vector<Block> all(blocks);
    std::vector<Fiber> fibers(blocks * threads);
    kernel_of_fibers = kernel, grid = dim3(blocks), idle = 0, failed = false;
    for (int i = 0; i < blocks * threads; i++) {
        Block& block = all[i / threads];
        if (i % threads == 0) {
            block.shared = aligned + i / threads * kSharedBytes, block.index = dim3(first + i / threads);
            block.warps.resize(threads / 32), block.warpgroups.resize(threads / 128);
        }
        Fiber& fiber = fibers[i];
        fiber.block = &block, fiber.thread = dim3(i % threads), fiber.done = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = stacks.data() + size_t{kStackBytes} * i, fiber.context.uc_stack.ss_size = kStackBytes;
        makecontext(&fiber.context, start_fiber, 0);
    }
    std::vector<int> warps(fibers.size() / 32);
    for (size_t i = 0; i < warps.size(); i++) warps[i] = i;
    for (size_t left = fibers.size(); left > 0 && !failed && idle < kMostIdle;) {
        std::shuffle(warps.begin(), warps.end(), random);
        for (int warp : warps) {
            if (random() % 4 == 0) continue;  // so that warps drift apart
            for (int i = 32 * warp; i < 32 * warp + 32; i++) {
                if (fibers[i].done) continue;
                current = &fibers[i], idle++;
                swapcontext(&scheduler, &current->context);
                if (current->done) left--, idle = 0;
            }
        }
    }
    return !failed && idle < kMostIdle;
}

}  // namespace emulator

using Traits = magi::backward::Traits<MAGI_HEAD_DIM, MAGI_HEAD_DIM_V, MAGI_ELEMENT, MAGI_SOFTCAP, MAGI_TILE_M, MAGI_STAGES, MAGI_FINE>;
static_assert(sizeof(magi::backward::Shared<Traits>) <= emulator::kSharedBytes);

extern "C" bool emulate_backward(magi::backward::Params const* params, int blocks, int seed, bool late) {
    emulator::late = late;
    return emulator::launch(0, blocks, magi::backward::kThreads, seed, [&] { magi::backward::backward<Traits>(*params); });
}

// What is there when a word that others wait for is raised is copied, from the next call on.
extern "C" void emulate_watch(void const* from, void* to, size_t bytes) { emulator::watched.push_back({from, to, bytes}); }
extern "C" void emulate_watch_nothing() { emulator::watched.clear(); }

extern "C" bool emulate_prepare(magi::backward::RowParams const* params, int blocks, int seed, bool) {
    auto const kernel = [&] { magi::backward::prepare<Traits>(*params); };
    bool done = true;
    for (int i = 0; i < blocks; i++) done &= emulator::launch(i, 1, magi::backward::kRowThreads, seed, kernel);
    return done;
}

#if MAGI_FINE
template <typename OfQueries>
bool emulate_queries(magi::backward::QueryParams const* params, int blocks, int seed, bool late) {
    static_assert(sizeof(magi::backward::QueryShared<OfQueries>) <= emulator::kSharedBytes);
    emulator::late = late;
    auto const kernel = [&] { magi::backward::differentiate_queries<Traits, OfQueries>(*params); };
    return emulator::launch(0, blocks, OfQueries::kThreads, seed, kernel);
}
extern "C" bool magi_backward_queries(magi::backward::QueryParams const* params, int blocks, int seed, bool late) {
    return emulate_queries<magi::backward::TraitsOfPacks<MAGI_HEAD_DIM, MAGI_ELEMENT>>(params, blocks, seed, late);
}
extern "C" bool magi_backward_queries_of_heads(magi::backward::QueryParams const* params, int blocks, int seed, bool late) {
    return emulate_queries<magi::backward::TraitsOfHeads<MAGI_HEAD_DIM, MAGI_ELEMENT>>(params, blocks, seed, late);
}
#endif
