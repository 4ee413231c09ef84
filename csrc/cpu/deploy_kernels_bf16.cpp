// The same kernels with products of bfloat16 pairs, which need an instruction set of their own (AVX512-BF16).
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "deploy_jobs.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,prefer-vector-width=512")
#define SK_AVX512 1
#define SK_BF16 1
namespace slimkernels::avx512_bf16 {
#define SK_LANES 16
#include "simd-inl.h"
#include "deploy-inl.h"
#undef SK_LANES
}  // namespace slimkernels::avx512_bf16
#undef SK_AVX512
#pragma GCC pop_options
#endif

namespace slimkernels::deploy {

const Kernels* bfloat16_kernels() {
#if defined(__x86_64__)
  if (current_isa() == Isa::kAvx512 && __builtin_cpu_supports("avx512bf16")) {
    static const Kernels kernels = slimkernels::avx512_bf16::kernels_of<c10::BFloat16>();
    return &kernels;
  }
#endif
  return nullptr;
}

}  // namespace slimkernels::deploy
