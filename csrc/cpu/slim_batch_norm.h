// What slim_batch_norm.cpp hands to its kernels.
#pragma once

#include "norm_layout.h"

namespace slimkernels {

// A tensor of the call: null when absent.
template <typename T>
struct Operand {
  T* data = nullptr;
  int64_t outer = 0, inner = 0;

  T* plane(int64_t n, int64_t c) const { return data ? data + n * outer + c * inner : nullptr; }
  T* row(int64_t r) const { return data ? data + r * outer : nullptr; }
};

template <typename T>
struct ForwardCall {
  NormLayout layout;
  Operand<const T> x, residual;
  Operand<T> y;
  const float *weight, *bias;  // (C,)
  float *mean, *var;           // (C,): computed when training, else given
  bool training;
  double eps;
  Activation activation;
};

template <typename T>
struct BackwardCall {
  NormLayout layout;
  Operand<const T> dy, x, saved;
  Operand<T> dx, dz;  // either may be absent
  const float *weight, *bias, *mean, *var;
  float *dw, *db;  // (C,)
  bool training, need_sums;
  double eps;
  Activation activation;
};

}  // namespace slimkernels
