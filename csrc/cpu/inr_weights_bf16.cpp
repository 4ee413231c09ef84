// inr_weights with products of bfloat16 pairs, which need an instruction set of their own (AVX512-BF16).
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "inr_weights.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,prefer-vector-width=512")
#define SK_AVX512 1
#define SK_BF16 1
namespace slimkernels::inr_bf16 {
#define SK_LANES 16
#include "simd-inl.h"
#include "inr_weights-inl.h"
#undef SK_LANES
}  // namespace slimkernels::inr_bf16
#undef SK_BF16
#undef SK_AVX512
#pragma GCC pop_options
#endif

namespace slimkernels {

const InrKernels* inr_bfloat16_kernels() {
#if defined(__x86_64__)
  if (current_isa() == Isa::kAvx512 && __builtin_cpu_supports("avx512bf16")) {
    static const InrKernels kernels = {&inr_bf16::inr::inr_forward<c10::BFloat16>,
                                       &inr_bf16::inr::inr_backward<c10::BFloat16>,
                                       &inr_bf16::inr::flush_gradients<c10::BFloat16>};
    return &kernels;
  }
#endif
  return nullptr;
}

}  // namespace slimkernels
