// The only place with inline PTX. Beside each piece stands a body for the CPU that computes exactly the same; sums of
// products are rounded once there, and in an order of its own on the GPU.
#pragma once

#include "launch.cuh"

namespace slimkernels {

// 16 bytes from global to shared memory, or zeros; they are there after cp_wait.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
#ifdef SK_EMULATED
  ::emulator::copy_async(shared, global, 16, valid ? 16 : 0);
#else
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
#endif
}

__device__ __forceinline__ void cp_commit() {
#ifdef SK_EMULATED
  ::emulator::copy_commit();
#else
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

// Waits until at most `kInFlight` of this thread's groups are under way.
template <int kInFlight>
__device__ __forceinline__ void cp_wait() {
#ifdef SK_EMULATED
  ::emulator::copy_wait(kInFlight);
#else
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kInFlight) : "memory");
#endif
}

}  // namespace slimkernels
