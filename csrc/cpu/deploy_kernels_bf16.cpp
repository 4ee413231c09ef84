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
#endif

#define SK_INL "deploy-inl.h"
#include "bf16_isa.h"

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
