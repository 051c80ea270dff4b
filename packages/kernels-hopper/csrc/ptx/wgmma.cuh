// SPDX-License-Identifier: Apache-2.0
// Products of a warpgroup, 64 rows by N columns by 16, of bf16 or fp16 with float accumulators: d += a * b.
// A is in shared memory or in registers, B in shared memory, given by the descriptors of layout.cuh.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace magi::ptx {

// Orders the warpgroup's own accesses to registers, and what it has fenced of shared memory, before products.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `Pending` of the latest groups are still under way.
template <int Pending>
__device__ __forceinline__ void wgmma_wait_group() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// Makes the compiler believe that registers change here, so that it moves no access across a wait.
template <int Count>
__device__ __forceinline__ void fence_registers(float (&registers)[Count]) {
#pragma unroll
    for (int i = 0; i < Count; i++) asm volatile("" : "+f"(registers[i])::"memory");
}

// Wgmma<N>::ss<Type, TransposedA, TransposedB>(d, a, b, accumulate) and Wgmma<N>::rs<Type, TransposedB>(d, a, b,
// accumulate). A transposed operand is contiguous along m or n, the others along k. Without `accumulate`, d = a * b.
template <int N>
struct Wgmma;

// clang-format off
#define MAGI_REGS_0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define MAGI_REGS_1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define MAGI_REGS_2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define MAGI_REGS_3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define MAGI_REGS_4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define MAGI_REGS_5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define MAGI_REGS_6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define MAGI_REGS_7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define MAGI_REGS_8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define MAGI_REGS_9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define MAGI_REGS_10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define MAGI_REGS_11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define MAGI_REGS_12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define MAGI_REGS_13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define MAGI_REGS_14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define MAGI_REGS_15 "%120, %121, %122, %123, %124, %125, %126, %127"

#define MAGI_LIST_16 MAGI_REGS_0
#define MAGI_LIST_32 MAGI_LIST_16 ", " MAGI_REGS_1
#define MAGI_LIST_48 MAGI_LIST_32 ", " MAGI_REGS_2
#define MAGI_LIST_64 MAGI_LIST_48 ", " MAGI_REGS_3
#define MAGI_LIST_80 MAGI_LIST_64 ", " MAGI_REGS_4
#define MAGI_LIST_96 MAGI_LIST_80 ", " MAGI_REGS_5
#define MAGI_LIST_112 MAGI_LIST_96 ", " MAGI_REGS_6
#define MAGI_LIST_128 MAGI_LIST_112 ", " MAGI_REGS_7
#define MAGI_LIST_144 MAGI_LIST_128 ", " MAGI_REGS_8
#define MAGI_LIST_160 MAGI_LIST_144 ", " MAGI_REGS_9
#define MAGI_LIST_176 MAGI_LIST_160 ", " MAGI_REGS_10
#define MAGI_LIST_192 MAGI_LIST_176 ", " MAGI_REGS_11
#define MAGI_LIST_208 MAGI_LIST_192 ", " MAGI_REGS_12
#define MAGI_LIST_224 MAGI_LIST_208 ", " MAGI_REGS_13
#define MAGI_LIST_240 MAGI_LIST_224 ", " MAGI_REGS_14
#define MAGI_LIST_256 MAGI_LIST_240 ", " MAGI_REGS_15

#define MAGI_ACC_8(d, i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define MAGI_ACC_16(d) MAGI_ACC_8(d, 0)
#define MAGI_ACC_32(d) MAGI_ACC_16(d), MAGI_ACC_8(d, 8)
#define MAGI_ACC_48(d) MAGI_ACC_32(d), MAGI_ACC_8(d, 16)
#define MAGI_ACC_64(d) MAGI_ACC_48(d), MAGI_ACC_8(d, 24)
#define MAGI_ACC_80(d) MAGI_ACC_64(d), MAGI_ACC_8(d, 32)
#define MAGI_ACC_96(d) MAGI_ACC_80(d), MAGI_ACC_8(d, 40)
#define MAGI_ACC_112(d) MAGI_ACC_96(d), MAGI_ACC_8(d, 48)
#define MAGI_ACC_128(d) MAGI_ACC_112(d), MAGI_ACC_8(d, 56)
#define MAGI_ACC_144(d) MAGI_ACC_128(d), MAGI_ACC_8(d, 64)
#define MAGI_ACC_160(d) MAGI_ACC_144(d), MAGI_ACC_8(d, 72)
#define MAGI_ACC_176(d) MAGI_ACC_160(d), MAGI_ACC_8(d, 80)
#define MAGI_ACC_192(d) MAGI_ACC_176(d), MAGI_ACC_8(d, 88)
#define MAGI_ACC_208(d) MAGI_ACC_192(d), MAGI_ACC_8(d, 96)
#define MAGI_ACC_224(d) MAGI_ACC_208(d), MAGI_ACC_8(d, 104)
#define MAGI_ACC_240(d) MAGI_ACC_224(d), MAGI_ACC_8(d, 112)
#define MAGI_ACC_256(d) MAGI_ACC_240(d), MAGI_ACC_8(d, 120)
// clang-format on

#define MAGI_WGMMA_SS(N, TYPE, A, B, P, TA, TB)                                                                 \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P ", 0;\n"                                               \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" MAGI_LIST_##N "}, %" #A   \
                 ", %" #B ", p, 1, 1, %" #TA ", %" #TB ";\n}\n"                                                 \
                 : MAGI_ACC_##N(d)                                                                              \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(TransposedA), "n"(TransposedB))

#define MAGI_WGMMA_RS(N, TYPE, A0, A1, A2, A3, B, P, TB)                                                        \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P ", 0;\n"                                               \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" MAGI_LIST_##N "}, {%" #A0 \
                 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", p, 1, 1, %" #TB ";\n}\n"                            \
                 : MAGI_ACC_##N(d)                                                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)),       \
                   "n"(TransposedB))

// The numbers are those of the operands that follow the accumulators.
#define MAGI_DEFINE_WGMMA(N, O0, O1, O2, O3, O4, O5, O6)                                                         \
    template <>                                                                                                  \
    struct Wgmma<N> {                                                                                            \
        template <typename Type, int TransposedA, int TransposedB>                                               \
        __device__ static __forceinline__ void ss(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {  \
            if constexpr (std::is_same_v<Type, __nv_bfloat16>) {                                                 \
                MAGI_WGMMA_SS(N, "bf16", O0, O1, O2, O3, O4);                                                    \
            } else {                                                                                             \
                MAGI_WGMMA_SS(N, "f16", O0, O1, O2, O3, O4);                                                     \
            }                                                                                                    \
        }                                                                                                        \
        template <typename Type, int TransposedB>                                                                \
        __device__ static __forceinline__ void rs(float (&d)[N / 2], uint32_t const (&a)[4], uint64_t b,         \
                                                  bool accumulate) {                                             \
            if constexpr (std::is_same_v<Type, __nv_bfloat16>) {                                                 \
                MAGI_WGMMA_RS(N, "bf16", O0, O1, O2, O3, O4, O5, O6);                                            \
            } else {                                                                                             \
                MAGI_WGMMA_RS(N, "f16", O0, O1, O2, O3, O4, O5, O6);                                             \
            }                                                                                                    \
        }                                                                                                        \
    };

MAGI_DEFINE_WGMMA(16, 8, 9, 10, 11, 12, 13, 14)
MAGI_DEFINE_WGMMA(32, 16, 17, 18, 19, 20, 21, 22)
MAGI_DEFINE_WGMMA(48, 24, 25, 26, 27, 28, 29, 30)
MAGI_DEFINE_WGMMA(64, 32, 33, 34, 35, 36, 37, 38)
MAGI_DEFINE_WGMMA(80, 40, 41, 42, 43, 44, 45, 46)
MAGI_DEFINE_WGMMA(96, 48, 49, 50, 51, 52, 53, 54)
MAGI_DEFINE_WGMMA(112, 56, 57, 58, 59, 60, 61, 62)
MAGI_DEFINE_WGMMA(128, 64, 65, 66, 67, 68, 69, 70)
MAGI_DEFINE_WGMMA(144, 72, 73, 74, 75, 76, 77, 78)
MAGI_DEFINE_WGMMA(160, 80, 81, 82, 83, 84, 85, 86)
MAGI_DEFINE_WGMMA(176, 88, 89, 90, 91, 92, 93, 94)
MAGI_DEFINE_WGMMA(192, 96, 97, 98, 99, 100, 101, 102)
MAGI_DEFINE_WGMMA(208, 104, 105, 106, 107, 108, 109, 110)
MAGI_DEFINE_WGMMA(224, 112, 113, 114, 115, 116, 117, 118)
MAGI_DEFINE_WGMMA(240, 120, 121, 122, 123, 124, 125, 126)
MAGI_DEFINE_WGMMA(256, 128, 129, 130, 131, 132, 133, 134)

}  // namespace magi::ptx
