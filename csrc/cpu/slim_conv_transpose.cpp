// Transposed convolutions: our own matrix products (slim_conv_transpose_patches.h), or oneDNN through ATen with slice,
// epilogue and gradient on the slice of our own.
#include <torch/library.h>

#include <vector>

#include "reference_call.h"
#include "slim_conv.h"
#include "slim_conv_transpose_patches.h"

namespace slimkernels {
namespace {

at::Tensor slim_conv_transpose_cpu(const at::Tensor& x, const at::Tensor& weight, const MaybeTensor& bias,
                                   int64_t out_channels, at::IntArrayRef stride, at::IntArrayRef padding,
                                   at::IntArrayRef output_padding, at::IntArrayRef dilation, int64_t groups,
                                   c10::string_view activation_name, const MaybeTensor& residual) {
  const ConvGeometry geometry{stride, padding, output_padding, dilation, groups, true};
  check_conv("slim_conv_transpose", x, weight, bias, out_channels, geometry);
  const Activation activation = parse_activation("slim_conv_transpose", activation_name);
  if (!conv_takes(x)) {
    return call_reference<decltype(slim_conv_transpose_cpu)>("slimkernels::slim_conv_transpose", x, weight, bias,
                                                             out_channels, stride, padding, output_padding, dilation,
                                                             groups, activation_name, residual);
  }
  if (patches_take(x, weight, out_channels, geometry, false)) {
    return patches_conv_transpose(x, weight, bias, out_channels, geometry, activation, residual);
  }
  const at::Tensor w = weight.narrow(0, 0, x.size(1)).narrow(1, 0, out_channels / groups);
  return conv_through_aten(x, w, bias, geometry, activation, residual, conv_format(x, weight));
}

// The kernels write and read as many numbers as these sizes say.
void check_gradient(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight, const ConvGeometry& g) {
  std::vector<int64_t> expected = {x.size(0), dy.size(1)};
  for (int64_t d = 0; d < x.dim() - 2; ++d) {
    expected.push_back((x.size(d + 2) - 1) * g.stride[d] - 2 * g.padding[d] +
                       g.dilation[d] * (weight.size(d + 2) - 1) + g.output_padding[d] + 1);
  }
  const at::IntArrayRef sizes = expected;
  TORCH_CHECK_VALUE(dy.sizes() == sizes, "slim_conv_transpose_backward: expected dy of shape ", sizes, ", got ",
                    dy.sizes());
}

ThreeTensors slim_conv_transpose_backward_cpu(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                                              int64_t full_bias, at::IntArrayRef stride, at::IntArrayRef padding,
                                              at::IntArrayRef output_padding, at::IntArrayRef dilation, int64_t groups,
                                              bool need_dx, bool need_dw, bool need_db) {
  const ConvGeometry geometry{stride, padding, output_padding, dilation, groups, true};
  TORCH_CHECK_VALUE(dy.dim() == x.dim(), "slim_conv_transpose_backward: expected dy to have ", x.dim(),
                    " dimensions, got shape ", dy.sizes());
  check_conv("slim_conv_transpose_backward", x, weight, std::nullopt, dy.size(1), geometry);
  check_gradient(dy, x, weight, geometry);
  TORCH_CHECK_VALUE(!need_db || full_bias >= dy.size(1), "slim_conv_transpose_backward: expected full_bias of at least ",
                    dy.size(1), ", got ", full_bias);
  if (!conv_takes(x) || dy.scalar_type() != x.scalar_type()) {
    return call_reference<decltype(slim_conv_transpose_backward_cpu)>(
        "slimkernels::slim_conv_transpose_backward", dy, x, weight, full_bias, stride, padding, output_padding,
        dilation, groups, need_dx, need_dw, need_db);
  }
  if (patches_take(x, weight, dy.size(1), geometry, true)) {
    return patches_conv_transpose_backward(dy, x, weight, full_bias, geometry, need_dx, need_dw, need_db);
  }
  const at::Tensor w = weight.narrow(0, 0, x.size(1)).narrow(1, 0, dy.size(1) / groups);
  return conv_backward_through_aten(dy, x, weight, w, full_bias, geometry, need_dx, need_dw, need_db);
}

}  // namespace

TORCH_LIBRARY_IMPL(slimkernels, CPU, m) {
  m.impl("slim_conv_transpose", &slim_conv_transpose_cpu);
  m.impl("slim_conv_transpose_backward", &slim_conv_transpose_backward_cpu);
}

}  // namespace slimkernels
