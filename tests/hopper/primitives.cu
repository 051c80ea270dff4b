// SPDX-License-Identifier: Apache-2.0
// One tile load, one product of each kind, against the host: tells which building block is wrong when a kernel is.
// nvcc -std=c++17 -gencode arch=compute_90a,code=sm_90a -Ipackages/kernels-hopper/csrc tests/hopper/primitives.cu
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "layout.cuh"
#include "ptx/barrier.cuh"
#include "ptx/cp_async_bulk_tensor.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/wgmma.cuh"

using namespace magi;
using Element = __nv_bfloat16;

constexpr int kM = 64, kN = 128;

template <int D>
struct Maps {
    CUtensorMap a, b;
};

// scores = a b^T, then out = bf16(scores) b, with a [64, D] and b [128, D]; raw is what lies in shared memory.
template <int D>
__global__ void products(__grid_constant__ Maps<D> const maps, float* scores_out, float* out_out, Element* raw) {
    using TileA = PanelTile<kM, D>;
    using TileB = PanelTile<kN, D>;
    extern __shared__ uint8_t memory[];
    uint8_t* a = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(memory) + 1023) & ~uintptr_t{1023});
    uint8_t* b = a + TileA::kBytes;
    __shared__ uint64_t full;
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(&full, 1);
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        ptx::mbarrier_arrive_expect_tx(&full, TileA::kBytes + TileB::kBytes);
        for (int panel = 0; panel < TileA::kPanels; panel++) {
            ptx::cp_async_bulk_tensor_3d(a + panel * TileA::kPanelBytes, &maps.a, &full, panel * TileA::kPanelColumns, 0,
                                         0, ptx::CacheHint::kEvictNormal);
            ptx::cp_async_bulk_tensor_3d(b + panel * TileB::kPanelBytes, &maps.b, &full, panel * TileB::kPanelColumns, 0,
                                         0, ptx::CacheHint::kEvictNormal);
        }
    }
    ptx::mbarrier_try_wait_parity(&full, 0);
    for (int i = threadIdx.x; i < kM * D; i += 128) raw[i] = *reinterpret_cast<Element*>(a + TileA::offset(i / D, i % D));

    float scores[kN / 2], out[D / 2];
    ptx::wgmma_fence();
#pragma unroll
    for (int column = 0; column < D; column += 16) {
        ptx::Wgmma<kN>::ss<Element, 0, 0>(scores, TileA::k_major(ptx::shared_address(a)) + TileA::from(0, column),
                                          TileB::k_major(ptx::shared_address(b)) + TileB::from(0, column), column > 0);
    }
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
    ptx::fence_registers(scores);
    uint32_t fragments[kN / 16][4];
#pragma unroll
    for (int i = 0; i < kN / 4; i++) {
        __nv_bfloat162 const pair = __floats2bfloat162_rn(scores[2 * i], scores[2 * i + 1]);
        fragments[i / 4][i % 4] = reinterpret_cast<uint32_t const&>(pair);
    }
    ptx::wgmma_fence();
#pragma unroll
    for (int row = 0; row < kN; row += 16) {
        ptx::Wgmma<D>::template rs<Element, 1>(out, fragments[row / 16],
                                               TileB::mn_major(ptx::shared_address(b)) + TileB::from(row, 0), row > 0);
    }
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
    ptx::fence_registers(out);
    for (int i = 0; i < kN / 2; i++)
        scores_out[accumulator_row(threadIdx.x, i) * kN + accumulator_column(threadIdx.x, i)] = scores[i];
    for (int i = 0; i < D / 2; i++)
        out_out[accumulator_row(threadIdx.x, i) * D + accumulator_column(threadIdx.x, i)] = out[i];
}

CUtensorMap map_of(Element* data, int rows, int columns, int box_columns, int box_rows) {
    CUtensorMap map;
    cuuint64_t const sizes[3] = {cuuint64_t(columns), 1, cuuint64_t(rows)};
    cuuint64_t const strides[2] = {cuuint64_t(columns) * 2, cuuint64_t(columns) * 2};
    cuuint32_t const box[3] = {cuuint32_t(box_columns), 1, cuuint32_t(box_rows)}, steps[3] = {1, 1, 1};
    // Asked for at run time, so that nothing of the driver needs to be linked.
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
    CUresult const status = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry)(
        &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
        box_columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_L2_PROMOTION_NONE,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS) std::printf("cuTensorMapEncodeTiled: error %d\n", status);
    return map;
}

template <int D>
bool check() {
    constexpr int kPanelColumns = PanelTile<kM, D>::kPanelColumns;
    Element *a, *b, *raw;
    float *scores, *out;
    cudaMallocManaged(&a, kM * D * 2);
    cudaMallocManaged(&b, kN * D * 2);
    cudaMallocManaged(&raw, kM * D * 2);
    cudaMallocManaged(&scores, kM * kN * 4);
    cudaMallocManaged(&out, kM * D * 4);
    unsigned state = 1;
    auto next = [&] { return ((state = state * 1664525u + 1013904223u) >> 16) / 65536.0f - 0.5f; };
    for (int i = 0; i < kM * D; i++) a[i] = __float2bfloat16(next());
    for (int i = 0; i < kN * D; i++) b[i] = __float2bfloat16(next());
    Maps<D> maps = {map_of(a, kM, D, kPanelColumns, kM), map_of(b, kN, D, kPanelColumns, kN)};
    int const bytes = PanelTile<kM, D>::kBytes + PanelTile<kN, D>::kBytes + 1024;
    cudaFuncSetAttribute(products<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    products<D><<<1, 128, bytes>>>(maps, scores, out, raw);
    cudaError_t const error = cudaDeviceSynchronize();
    if (error != cudaSuccess) {
        std::printf("d %d: %s\n", D, cudaGetErrorString(error));
        return false;
    }
    double load = 0, first = 0, second = 0;
    std::vector<float> rounded(kM * kN);
    for (int i = 0; i < kM * D; i++) load = fmax(load, fabs(__bfloat162float(raw[i]) - __bfloat162float(a[i])));
    for (int m = 0; m < kM; m++) {
        for (int n = 0; n < kN; n++) {
            double sum = 0;
            for (int k = 0; k < D; k++) sum += double(__bfloat162float(a[m * D + k])) * __bfloat162float(b[n * D + k]);
            first = fmax(first, fabs(sum - scores[m * kN + n]));
            rounded[m * kN + n] = __bfloat162float(__float2bfloat16(scores[m * kN + n]));
        }
        for (int d = 0; d < D; d++) {
            double sum = 0;
            for (int n = 0; n < kN; n++) sum += double(rounded[m * kN + n]) * __bfloat162float(b[n * D + d]);
            second = fmax(second, fabs(sum - out[m * D + d]));
        }
    }
    bool const right = load == 0 && first < 1e-3 && second < 1e-3;
    std::printf("d %3d: load %.1e, a b^T %.1e, (a b^T) b %.1e: %s\n", D, load, first, second, right ? "right" : "WRONG");
    return right;
}

int main() {
    bool right = true;
    right &= check<64>();
    right &= check<96>();
    right &= check<128>();
    right &= check<192>();
    right &= check<256>();
    return !right;
}
