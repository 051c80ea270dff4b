// SPDX-License-Identifier: Apache-2.0
// Matrices of a warp and products of a warpgroup on the host, as the PTX manual has them: csrc/ptx/ldmatrix.cuh and so on.
#pragma once

#include "ptx.h"

namespace magi::ptx {

// Element (row, column) of 8 by 8 is in lane 4 row + column / 2, in the half column % 2 of its word.
inline void stmatrix_x4_trans(uint32_t address, uint32_t const (&matrices)[4]) {
    auto const& words = emulator::warp().words;
    emulator::warp().words[emulator::lane()][4] = address;
    __syncwarp();
    for (int i = 0; i < 8; i++) {
        int const row = emulator::lane() / 4, column = emulator::lane() % 4 * 2 + i % 2;
        *at_shared<uint16_t>(words[i / 2 * 8 + column][4] + 2 * row) = matrices[i / 2] >> 16 * (i % 2);
    }
    __syncwarp();
}
inline void ldmatrix_x4(uint32_t address, uint32_t (&matrices)[4]) {
    auto const& words = emulator::warp().words;
    emulator::warp().words[emulator::lane()][4] = address;
    __syncwarp();
    for (int i = 0; i < 4; i++) {
        matrices[i] = *at_shared<uint32_t>(words[i * 8 + emulator::lane() / 4][4] + emulator::lane() % 4 * 4);
    }
    __syncwarp();
}
inline uint32_t movmatrix_trans(uint32_t word) {
    uint32_t transposed = 0;
    for (int half = 0; half < 2; half++) {
        int const row = emulator::lane() / 4, column = emulator::lane() % 4 * 2 + half;
        transposed |= (emulator::from_lane(word, 4 * column + row / 2) >> 16 * (row % 2) & 0xFFFF) << 16 * half;
    }
    return transposed;
}

// Bits of element (row or column, k) of an operand in shared memory, by its descriptor.
inline uint16_t element_of(uint64_t descriptor, bool transposed, int place, int k) {
    uint32_t const start = (descriptor & 0x3FFF) << 4, leading = (descriptor >> 16 & 0x3FFF) << 4;
    uint32_t const stride = (descriptor >> 32 & 0x3FFF) << 4, width = descriptor >> 62 == 1 ? 128 : 64;
    if (descriptor >> 62 != 1 && descriptor >> 62 != 2) emulator::fail("a descriptor has no swizzle that is used here");
    int const row = transposed ? k : place, column = transposed ? place % (width / 2) : k;
    uint32_t const panel = transposed ? place / (width / 2) * leading : 0;
    uint32_t const plain = start + panel + row / 8 * stride + row % 8 * width + column * 2;
    return *at_shared<uint16_t>(plain ^ (plain >> 3 & (width == 128 ? 0x70 : 0x30)));
}

inline void multiply(emulator::Product const& product) {
    static float left[64][16], right[256][16];
    for (int k = 0; k < 16; k++) {
        for (int row = 0; row < 64 && !product.left_in_registers; row++) {
            left[row][k] = product.number(element_of(product.left, product.left_transposed, row, k));
        }
        for (int column = 0; column < product.columns; column++) {
            right[column][k] = product.number(element_of(product.right, product.right_transposed, column, k));
        }
    }
    for (int thread = 0; thread < 128; thread++) {
        int const row = thread / 32 * 16 + thread % 32 / 4, pair = thread % 4 * 2;
        for (int i = 0; i < 8 && product.left_in_registers; i++) {
            left[row + i / 2 % 2 * 8][i / 4 * 8 + pair + i % 2] =
                product.number(product.fragments[thread][i / 2] >> 16 * (i % 2));
        }
    }
    for (int thread = 0; thread < 128; thread++) {
        for (int i = 0; i < product.columns / 2; i++) {
            int const row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + thread % 4 * 2 + i % 2;
            float sum = product.adds ? product.sums[thread][i] : 0;
            for (int k = 0; k < 16; k++) sum += left[row][k] * right[column][k];
            product.sums[thread][i] = sum;
        }
    }
}

// In the warpgroup's first thread, while the others wait.
template <typename Work>
void once_in_warpgroup(Work work) {
    emulator::meet(emulator::warpgroup().meeting, 128);
    if (threadIdx.x % 128 == 0) work(emulator::warpgroup());
    emulator::meet(emulator::warpgroup().meeting, 128);
}
inline void finish(emulator::Warpgroup& warpgroup, size_t pending) {
    for (; warpgroup.groups.size() > pending; warpgroup.groups.pop_front()) {
        for (int i = 0; i < warpgroup.groups.front(); i++) {
            multiply(warpgroup.started.front());
            warpgroup.started.pop_front();
        }
    }
}
inline void wgmma_fence() {
    once_in_warpgroup([](auto&) {});
}
inline void wgmma_commit_group() {
    once_in_warpgroup([](auto& warpgroup) {
        warpgroup.groups.push_back(warpgroup.uncommitted);
        warpgroup.uncommitted = 0;
        if (!emulator::late) finish(warpgroup, 0);
    });
}
template <int Pending>
void wgmma_wait_group() {
    once_in_warpgroup([](auto& warpgroup) { finish(warpgroup, Pending); });
}
template <int Count>
void fence_registers(float (&)[Count]) {}

template <typename Element>
float number_of(uint16_t bits) {
    Element element;
    std::memcpy(&element, &bits, sizeof(bits));
    return static_cast<float>(element);
}
template <int N>
struct Wgmma {
    template <typename Type>
    static void start(float* sums, uint32_t const* fragments, bool left_transposed, bool right_transposed, uint64_t left,
                      uint64_t right, bool adds) {
        auto& next = emulator::warpgroup().next;
        next.columns = N, next.left_in_registers = fragments != nullptr, next.left_transposed = left_transposed;
        next.right_transposed = right_transposed, next.adds = adds, next.number = number_of<Type>;
        next.left = left, next.right = right;
        next.sums[threadIdx.x % 128] = sums;
        if (fragments != nullptr) std::memcpy(next.fragments[threadIdx.x % 128], fragments, sizeof(next.fragments[0]));
        once_in_warpgroup([](auto& warpgroup) { warpgroup.started.push_back(warpgroup.next), warpgroup.uncommitted++; });
    }
    template <typename Type, int TransposedA, int TransposedB>
    static void ss(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
        start<Type>(d, nullptr, TransposedA, TransposedB, a, b, accumulate);
    }
    template <typename Type, int TransposedB>
    static void rs(float (&d)[N / 2], uint32_t const (&a)[4], uint64_t b, bool accumulate) {
        start<Type>(d, a, false, TransposedB, 0, b, accumulate);
    }
};

}  // namespace magi::ptx
