// What slim_batch_norm.cpp hands to its kernels.
#pragma once

#include <string_view>
#include <tuple>

#include "norm_layout.h"
#include "row_norm.h"

namespace slimkernels {

// The op's kernels, for callers that are below autograd themselves.
std::tuple<at::Tensor, at::Tensor, at::Tensor> slim_batch_norm_cpu(
    const at::Tensor& x, const OptionalTensor& running_mean, const OptionalTensor& running_var, const OptionalTensor& weight,
    const OptionalTensor& bias, bool training, double eps, c10::string_view name, const OptionalTensor& residual);

// kFull: gradients of weight and bias have their full size, zero outside the slice; else they are the slice.
template <bool kFull>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> slim_batch_norm_backward_cpu(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& mean, const at::Tensor& var, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& output, const OptionalTensor& residual, bool training, double eps,
    c10::string_view name, bool need_dx, bool need_dw, bool need_db, bool need_dresidual);

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
