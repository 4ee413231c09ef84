// inr_weights with products of bfloat16 pairs, which need an instruction set of their own (AVX512-BF16).
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "inr_weights.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define SK_INL "inr_weights-inl.h"
#include "bf16_isa.h"

namespace slimkernels {

const InrKernels* inr_bfloat16_kernels() {
#if defined(__x86_64__)
  if (current_isa() == Isa::kAvx512 && __builtin_cpu_supports("avx512bf16")) {
    static const InrKernels kernels = {&avx512_bf16::inr::inr_forward<c10::BFloat16>,
                                       &avx512_bf16::inr::inr_backward<c10::BFloat16>,
                                       &avx512_bf16::inr::flush_gradients<c10::BFloat16>};
    return &kernels;
  }
#endif
  return nullptr;
}

}  // namespace slimkernels
