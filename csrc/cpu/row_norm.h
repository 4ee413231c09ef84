// Norms over the last dimension: layer norm, and RMS norm (no mean, no bias).
#pragma once

#include "norm_layout.h"

#include <tuple>

namespace slimkernels {

using OptionalTensor = std::optional<at::Tensor>;

template <typename T>
struct RowNormCall {
  int64_t rows, columns;
  const T *x, *residual;  // residual may be null
  T* y;
  const float *weight, *bias;  // (columns, padded to full vectors)
  float *mean, *invstd;        // (rows,); mean is null for RMS norm
  double eps;
  Activation activation;
};

template <typename T>
struct RowNormBackwardCall {
  int64_t rows, columns;
  const T *dy, *x, *saved;  // saved: output or residual, may be null
  T *dx, *dz;               // either may be null
  const float *weight, *bias, *mean, *invstd;
  float *dw, *db;  // (columns,)
  Activation activation;
};

// True when the kernels take these; the entry calls its reference otherwise.
bool row_norm_takes(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias);

// y, mean (undefined without `with_mean`) and inverse standard deviation / root mean square.
std::tuple<at::Tensor, at::Tensor, at::Tensor> row_norm(std::string_view op, const at::Tensor& x, const OptionalTensor& weight,
                                                        const OptionalTensor& bias, bool with_mean, double eps,
                                                        std::string_view activation, const OptionalTensor& residual);

// dx, dw, db, dresidual; an empty tensor where not needed.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> row_norm_backward(
    std::string_view op, const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& mean, const at::Tensor& invstd,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& output, const OptionalTensor& residual,
    std::string_view activation, bool need_dx, bool need_dw, bool need_db, bool need_dresidual);

// Zeros like the parameter, with the gradient of its first entries.
at::Tensor full_gradient(const at::Tensor& like, const std::vector<float>& active);

}  // namespace slimkernels
