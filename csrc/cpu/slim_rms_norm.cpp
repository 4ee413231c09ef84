#include "reference_call.h"
#include "row_norm.h"

#include <torch/library.h>

namespace slimkernels {
namespace {

std::tuple<at::Tensor, at::Tensor> slim_rms_norm_cpu(const at::Tensor& x, const OptionalTensor& weight, double eps,
                                                     c10::string_view activation, const OptionalTensor& residual) {
  if (!row_norm_takes(x, weight, std::nullopt)) {
    return call_reference<decltype(slim_rms_norm_cpu)>("slimkernels::slim_rms_norm", x, weight, eps, activation, residual);
  }
  const auto [y, mean, invrms] = row_norm("slim_rms_norm", x, weight, std::nullopt, false, eps, activation, residual);
  return {y, invrms};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> slim_rms_norm_backward_cpu(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& invrms, const OptionalTensor& weight,
    const OptionalTensor& output, const OptionalTensor& residual, c10::string_view activation, bool need_dx, bool need_dw,
    bool need_dresidual) {
  if (!row_norm_takes(x, weight, std::nullopt) || invrms.scalar_type() != at::kFloat) {
    return call_reference<decltype(slim_rms_norm_backward_cpu)>("slimkernels::slim_rms_norm_backward", dy, x, invrms, weight,
                                                                output, residual, activation, need_dx, need_dw, need_dresidual);
  }
  const auto [dx, dw, db, dz] =
      row_norm_backward("slim_rms_norm_backward", dy, x, std::nullopt, invrms, weight, std::nullopt, output, residual, activation,
                        need_dx, need_dw, false, need_dresidual);
  return {dx, dw, dz};
}

}  // namespace

TORCH_LIBRARY_IMPL(slimkernels, CPU, m) {
  m.impl("slim_rms_norm", &slim_rms_norm_cpu);
  m.impl("slim_rms_norm_backward", &slim_rms_norm_backward_cpu);
}

}  // namespace slimkernels
