// SPDX-License-Identifier: Apache-2.0
// Copies of 16 bytes each from device memory to shared memory, which run beside the thread that starts them.
#pragma once

#include "mbarrier.cuh"

namespace magi::ptx {

// Copies 16 bytes, or clears them where `there` is false; `source` is then not read.
__device__ __forceinline__ void cp_async_16(uint32_t target, void const* source, bool there) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(there ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `Pending` of this thread's latest groups are still under way.
template <int Pending>
__device__ __forceinline__ void cp_async_wait_group() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

}  // namespace magi::ptx
