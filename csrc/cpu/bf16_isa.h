// Compiles one "-inl.h" file for CPUs with products and conversions of bfloat16 (AVX512-BF16), in slimkernels::avx512_bf16.
// To be used like foreach_isa.h, after it or alone.
#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,prefer-vector-width=512")
#define SK_AVX512 1
#define SK_BF16 1
namespace slimkernels::avx512_bf16 {
#define SK_LANES 16
#include "simd-inl.h"
#include SK_INL
#undef SK_LANES
}  // namespace slimkernels::avx512_bf16
#undef SK_BF16
#undef SK_AVX512
#pragma GCC pop_options
#endif

#undef SK_INL
