#include "reference_call.h"
#include "row_norm.h"

#include <torch/library.h>

namespace slimkernels {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> slim_layer_norm_cpu(const at::Tensor& x, const OptionalTensor& weight,
                                                                   const OptionalTensor& bias, double eps,
                                                                   c10::string_view activation, const OptionalTensor& residual) {
  if (!row_norm_takes(x, weight, bias)) {
    return call_reference<decltype(slim_layer_norm_cpu)>("slimkernels::slim_layer_norm", x, weight, bias, eps, activation,
                                                         residual);
  }
  return row_norm("slim_layer_norm", x, weight, bias, true, eps, activation, residual);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> slim_layer_norm_backward_cpu(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& mean, const at::Tensor& invstd, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& output, const OptionalTensor& residual, c10::string_view activation,
    bool need_dx, bool need_dw, bool need_db, bool need_dresidual) {
  if (!row_norm_takes(x, weight, bias) || mean.scalar_type() != at::kFloat || invstd.scalar_type() != at::kFloat) {
    return call_reference<decltype(slim_layer_norm_backward_cpu)>("slimkernels::slim_layer_norm_backward", dy, x, mean, invstd,
                                                                  weight, bias, output, residual, activation, need_dx, need_dw,
                                                                  need_db, need_dresidual);
  }
  return row_norm_backward("slim_layer_norm_backward", dy, x, mean, invstd, weight, bias, output, residual, activation, need_dx,
                           need_dw, need_db, need_dresidual);
}

}  // namespace

TORCH_LIBRARY_IMPL(slimkernels, CPU, m) {
  m.impl("slim_layer_norm", &slim_layer_norm_cpu);
  m.impl("slim_layer_norm_backward", &slim_layer_norm_backward_cpu);
}

}  // namespace slimkernels
