// Convolution by a 1x1 kernel as matrix products, channels-last: pixels are the rows of x and y.
#pragma once

#include <optional>

#include "slim_conv.h"

namespace slimkernels {

// Whether all three directions run here: 1x1, stride 1, no padding, channels side by side.
bool is_pointwise(const at::Tensor& x, const at::Tensor& weight, const ConvGeometry& geometry);

at::Tensor pointwise_conv(const at::Tensor& x, const at::Tensor& weight, const MaybeTensor& bias, int64_t out_channels,
                          Activation activation, const MaybeTensor& residual);
at::Tensor pointwise_input_gradient(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight);
at::Tensor pointwise_weight_gradient(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                                     GradientSize size);

}  // namespace slimkernels
