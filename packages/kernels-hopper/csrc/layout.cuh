// SPDX-License-Identifier: Apache-2.0
// Where the elements of tiles lie: swizzled panels in shared memory, and fragments in registers. Every function can be
// evaluated on the host, where tests compare it with what the PTX manual says.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MAGI_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MAGI_HOST_DEVICE inline
#endif

namespace magi {

constexpr int kBytesPerElement = 2;  // bf16 and fp16

// A tile of `Rows` rows of `Columns` elements in shared memory, as the copy engine writes it and products read it: cut
// into panels of as many columns as fit a swizzle's width, one panel after another, each row by row. Within a panel,
// the 16-byte chunks of a row are permuted by the row, in a pattern that repeats every 8 rows.
template <int Rows_, int Columns_>
struct PanelTile {
    static constexpr int kRows = Rows_;
    static constexpr int kColumns = Columns_;
    static constexpr int kSwizzleBytes = kColumns % 64 == 0 ? 128 : 64;
    static constexpr int kPanelColumns = kSwizzleBytes / kBytesPerElement;
    static constexpr int kPanels = kColumns / kPanelColumns;
    static constexpr int kPanelBytes = kRows * kSwizzleBytes;
    static constexpr int kBytes = kPanels * kPanelBytes;
    static constexpr int kGroupBytes = 8 * kSwizzleBytes;  // of 8 rows
    static_assert(kColumns % kPanelColumns == 0, "columns must fill panels");
    static_assert(kRows % 8 == 0, "rows must come in groups of 8");

    // The byte at which an element lies, from the tile's first; the tile is aligned to 1024 bytes.
    MAGI_HOST_DEVICE static constexpr uint32_t offset(int row, int column) {
        uint32_t const plain = (column / kPanelColumns) * kPanelBytes + row * kSwizzleBytes +
                               (column % kPanelColumns) * kBytesPerElement;
        return plain ^ ((plain >> 3) & (kSwizzleBytes == 128 ? 0x70 : 0x30));
    }

    // The descriptor of the wgmma operand that begins with the tile, whose shared address `base` is. An operand that
    // begins elsewhere in the tile has a descriptor that is greater by a constant: one addition for each product.

    // Contiguous along k: rows are those of m or n, columns k.
    MAGI_HOST_DEVICE static constexpr uint64_t k_major(uint32_t base) { return descriptor(base, 16); }

    // Contiguous along m or n: columns are those of m or n, rows k.
    MAGI_HOST_DEVICE static constexpr uint64_t mn_major(uint32_t base) { return descriptor(base, kPanelBytes); }

    // What to add for an operand that begins at a row, a multiple of 8, and a column: for k_major a multiple of 16, for
    // mn_major the first of a panel.
    MAGI_HOST_DEVICE static constexpr uint64_t from(int row, int column) {
        return ((column / kPanelColumns) * kPanelBytes + row * kSwizzleBytes +
                (column % kPanelColumns) * kBytesPerElement) >> 4;
    }

   private:
    MAGI_HOST_DEVICE static constexpr uint64_t descriptor(uint32_t base, uint32_t leading) {
        uint64_t const kind = kSwizzleBytes == 128 ? 1 : 2;
        return (kind << 62) | static_cast<uint64_t>(kGroupBytes >> 4) << 32 | static_cast<uint64_t>(leading >> 4) << 16 |
               (base >> 4 & 0x3FFF);
    }
};

// The row and the column of accumulator i of a thread of a warpgroup, in the 64 rows of its product.
MAGI_HOST_DEVICE constexpr int accumulator_row(int thread, int i) {
    return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
}
MAGI_HOST_DEVICE constexpr int accumulator_column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

// How many of a thread's columns, of one row and in order, lie before `column`; negative before the first of all.
MAGI_HOST_DEVICE constexpr int columns_before(int thread, int column) {
    int const shifted = column - thread % 4 * 2;
    int const within = shifted & 7;
    return (shifted >> 3) * 2 + (within < 2 ? within : 2);
}

// Rows of accumulators in device memory may have their columns in such an order that four of one thread, i, i + 1, i + 4
// and i + 5, are neighbors: the column at a place. Of thread t they begin at i / 8 * 16 + t % 4 * 4, for even i / 4.
MAGI_HOST_DEVICE constexpr int column_of(int place) {
    return place / 16 * 16 + place / 2 % 2 * 8 + place / 4 % 4 * 2 + place % 2;
}

}  // namespace magi
