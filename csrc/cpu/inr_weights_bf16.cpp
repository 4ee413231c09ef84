// inr_weights with products of bfloat16 pairs, which need an instruction set of their own (AVX512-BF16), and what its kernels
// share.
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
                                       &inr_bf16::inr::inr_backward<c10::BFloat16>};
    return &kernels;
  }
#endif
  return nullptr;
}

void clear_gradients(const InrPlan& p, int64_t mlp, InrGradients& g) {
  g.mlp = mlp;
  const int64_t hp = p.padded;
  const auto zeros = [](Buffer<float>& buffer, int64_t size) {
    buffer.resize(size);
    std::fill_n(buffer.data(), size, 0.0f);
  };
  zeros(g.w_in, kInrAxes * p.encoded() * hp);
  zeros(g.b_in, hp);
  zeros(g.w_hidden, p.depth * hp * hp);
  zeros(g.b_hidden, p.depth * hp);
  zeros(g.w_out, p.outputs * hp);
  zeros(g.b_out, p.padded_out);
  g.skip.assign(p.depth, 0.0);
}

void flush_gradients(const InrPlan& p, const InrGradients& g, const InrGradientOutputs& out) {
  const int64_t h = p.hidden, hp = p.padded, x = p.encoded(), d = p.depth;
  float* w_in = out.w_in + g.mlp * h * p.inputs;
  for (int64_t j0 = 0; j0 < h; j0 += 16) {
    for (int64_t axis = 0; axis < kInrAxes; ++axis) {
      for (int64_t t = 0; t < x; ++t) {
        float* column = w_in + p.column(axis, t);
        for (int64_t j = j0; j < std::min(h, j0 + 16); ++j) column[j * p.inputs] = g.w_in[(axis * x + t) * hp + j];
      }
    }
  }
  std::copy_n(g.b_in.data(), h, out.b_in + g.mlp * h);
  for (int64_t i = 0; i < d * h; ++i) {
    std::copy_n(g.w_hidden.data() + (i / h * hp + i % h) * hp, h, out.w_hidden + (g.mlp * d * h + i) * h);
  }
  for (int64_t k = 0; k < d; ++k) {
    std::copy_n(g.b_hidden.data() + k * hp, h, out.b_hidden + (g.mlp * d + k) * h);
    out.skip[g.mlp * d + k] = static_cast<float>(g.skip[k]);
  }
  for (int64_t o = 0; o < p.outputs; ++o) {
    std::copy_n(g.w_out.data() + o * hp, h, out.w_out + (g.mlp * p.outputs + o) * h);
  }
  std::copy_n(g.b_out.data(), p.outputs, out.b_out + g.mlp * p.outputs);
}

}  // namespace slimkernels
