// SPDX-License-Identifier: Apache-2.0
// Prints what the functions of csrc/layout.cuh return, for tests/hopper/test_layout.py.
#include <cstdio>

#include "layout.cuh"

using namespace magi;

template <typename Tile>
void print_offsets(char const* name) {
    for (int row = 0; row < Tile::kRows; row++)
        for (int column = 0; column < Tile::kColumns; column++)
            std::printf("%s %d %d %u\n", name, row, column, Tile::offset(row, column));
}

int main() {
    print_offsets<PanelTile<64, 128>>("swizzle128");
    print_offsets<PanelTile<40, 96>>("swizzle64");
    for (int thread = 0; thread < 128; thread++) {
        for (int i = 0; i < 64; i++) {
            std::printf("accumulator %d %d %d %d\n", thread, i, accumulator_row(thread, i),
                        accumulator_column(thread, i));
        }
        for (int column = -70; column < 140; column++) {
            std::printf("before %d %d %d\n", thread, column, columns_before(thread, column));
        }
    }
    for (int place = 0; place < 96; place++) std::printf("column_of %d %d\n", place, column_of(place));
    using Tile = PanelTile<128, 128>;
    using Narrow = PanelTile<128, 96>;
    std::printf("k_major %d %llx\n", 0, (unsigned long long)(Tile::k_major(0x8400) + Tile::from(64, 80)));
    std::printf("mn_major %d %llx\n", 0, (unsigned long long)(Tile::mn_major(0x8400) + Tile::from(16, 64)));
    std::printf("k_major_64 %d %llx\n", 0, (unsigned long long)(Narrow::k_major(0x8400) + Narrow::from(64, 48)));
    std::printf("mn_major_64 %d %llx\n", 0, (unsigned long long)(Narrow::mn_major(0x8400) + Narrow::from(16, 32)));
}
