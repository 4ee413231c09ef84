// Transposed convolutions of channels-last images as matrix products. Each pixel of x owns a patch of the output, the
// window of the kernel; patches of neighbours overlap where the stride is shorter than the kernel.
#pragma once

#include "slim_conv.h"

namespace slimkernels {

// Whether forward runs here, and whether both gradients do: geometry, layout, and the sizes at which it was measured to
// be the faster way.
bool patches_take(const at::Tensor& x, const at::Tensor& weight, int64_t out_channels, const ConvGeometry& geometry,
                  bool backward);

at::Tensor patches_conv_transpose(const at::Tensor& x, const at::Tensor& weight, const MaybeTensor& bias,
                                  int64_t out_channels, const ConvGeometry& geometry, Activation activation,
                                  const MaybeTensor& residual);
ThreeTensors patches_conv_transpose_backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                                             int64_t full_bias, const ConvGeometry& geometry, bool need_dx,
                                             bool need_dw, bool need_db);

}  // namespace slimkernels
