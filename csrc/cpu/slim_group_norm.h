// What slim_group_norm.cpp hands to its kernels: contiguous (samples, channels, length) tensors.
#pragma once

#include "norm_layout.h"

namespace slimkernels {

template <typename T>
struct GroupNormCall {
  int64_t samples, channels, length, group_size;
  const T *x, *residual;  // residual may be null
  T* y;
  const float *weight, *bias;  // (channels,)
  float *mean, *invstd;        // (samples, groups)
  double eps;
  Activation activation;

  int64_t groups() const { return (channels + group_size - 1) / group_size; }
};

template <typename T>
struct GroupNormBackwardCall {
  int64_t samples, channels, length, group_size;
  const T *dy, *x, *saved;  // saved: output or residual, may be null
  T *dx, *dz;               // either may be null
  const float *weight, *bias, *mean, *invstd;
  double *dw, *db;  // (samples, channels): summed over the samples afterwards
  Activation activation;

  int64_t groups() const { return (channels + group_size - 1) / group_size; }
};

}  // namespace slimkernels
