// How a kernel is launched and gets its dynamic shared memory. The tests compile the same sources with g++: they define
// SK_EMULATED and put a CPU model of the CUDA language in the place of cuda_runtime.h.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#ifdef SK_EMULATED

#define SK_LAUNCH(kernel, grid, block, smem, stream, ...) \
  ::emulator::launch(#kernel, grid, block, smem, [=] { kernel(__VA_ARGS__); })
#define SK_DYN_SMEM(T, name) T* name = ::emulator::dynamic_shared<T>()

#else

// Above 48 KiB a kernel has to be told that it may.
#define SK_LAUNCH(kernel, grid, block, smem, stream, ...)                                     \
  do {                                                                                        \
    if ((smem) > 48 * 1024) {                                                                 \
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)(smem)); \
    }                                                                                         \
    kernel<<<(grid), (block), (smem), (cudaStream_t)(stream)>>>(__VA_ARGS__);                 \
  } while (0)
#define SK_DYN_SMEM(T, name)                                          \
  extern __shared__ __align__(128) unsigned char sk_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(sk_dynamic_shared)

#endif

namespace slimkernels {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace slimkernels
