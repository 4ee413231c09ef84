// Compiles one "-inl.h" file once per instruction set, each copy in a namespace of its own.
//
//   #define SK_INL "slim_linear-inl.h"
//   #include "foreach_isa.h"
//
// gives slimkernels::base, slimkernels::avx2 and slimkernels::avx512 the contents of simd-inl.h and of that file; SK_CALL_ISA
// (common.h) calls the right copy. Every other header must be included before: code from a header that is first seen under
// the pragma would be compiled for the wider instruction set and could be picked by the linker for all callers.
// No include guard: a file may use it several times with different SK_INL.
#include <cmath>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace slimkernels::base {
#define SK_LANES 4
#include "simd-inl.h"
#include SK_INL
#undef SK_LANES
}  // namespace slimkernels::base

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define SK_AVX2 1
namespace slimkernels::avx2 {
#define SK_LANES 8
#include "simd-inl.h"
#include SK_INL
#undef SK_LANES
}  // namespace slimkernels::avx2
#undef SK_AVX2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
#define SK_AVX512 1
namespace slimkernels::avx512 {
#define SK_LANES 16
#include "simd-inl.h"
#include SK_INL
#undef SK_LANES
}  // namespace slimkernels::avx512
#undef SK_AVX512
#pragma GCC pop_options
#endif

#undef SK_INL
