// SPDX-License-Identifier: Apache-2.0
// Prints where the backward kernels' accumulators of the gradients of queries belong; test_backward_layout.py reads it.
#include <cstdio>

#include "backward/traits.cuh"

template <int HeadDim, int TileM>
void print() {
    using Traits = magi::backward::Traits<HeadDim, HeadDim, short, false, TileM, 2>;
    for (int part = 0; part < Traits::kDqParts; part++) {
        for (int thread = 0; thread < 128; thread++) {
            for (int i = 0; i < Traits::kDqRegisters * Traits::kDqPasses; i++) {
                auto const place = Traits::dq_place(part, thread, i);
                std::printf("%d %d %d %d %d %d\n", HeadDim, part, thread, i, place.row, place.column);
            }
        }
    }
}

int main() {
    print<64, 64>();
    print<96, 64>();
    print<128, 80>();
    print<192, 64>();
    print<256, 64>();
}
