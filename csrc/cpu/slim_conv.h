// What the files of slim_conv and slim_conv_transpose share: the geometry, its checks, and the kernels' entries.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "common.h"

namespace slimkernels {

using MaybeTensor = std::optional<at::Tensor>;
using ThreeTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

struct ConvGeometry {
  at::IntArrayRef stride, padding, output_padding, dilation;
  int64_t groups;
  bool transposed;
};

// Everything that memory safety needs, in the words of the public function.
void check_conv(const char* op, const at::Tensor& x, const at::Tensor& weight, const MaybeTensor& bias,
                int64_t out_channels, const ConvGeometry& geometry);

// Layout of the output and of the gradient of x: channels-last when x or weight is, as in PyTorch.
at::MemoryFormat conv_format(const at::Tensor& x, const at::Tensor& weight);

// The kernels' dtypes; float64 goes to the reference.
bool conv_takes(const at::Tensor& t);

// Sizes of the output of a convolution (not transposed).
c10::DimVector conv_output_sizes(const at::Tensor& x, const at::Tensor& weight, int64_t out_channels,
                                 const ConvGeometry& geometry);

// `residual`, checked, with the strides of y; another layout costs a copy, so that one loop serves every case.
at::Tensor same_layout(const at::Tensor& residual, const at::Tensor& y);

// y <- act(y + residual) in place, one pass. y is dense; residual has its shape.
void add_activate(at::Tensor& y, const MaybeTensor& residual, Activation activation);

// The float sums of dy over everything but its channels.
at::Tensor channel_sums(const at::Tensor& dy);

// What a backward returns of weight and bias: gradients of the full size, or of the active slice alone.
enum class GradientSize { kFull, kSlice };

// `part` in the leading corner of zeros of `full`'s shape and layout, or `part` itself (dense, in its dtype).
at::Tensor sized_gradient(const at::Tensor& part, const at::Tensor& full, GradientSize size);
// The same for a bias with `full` entries, from the first `active` of `sums`.
at::Tensor sized_bias_gradient(const at::Tensor& sums, int64_t active, int64_t full, at::ScalarType dtype, GradientSize size);

// PyTorch's convolution on the strided slice `w`, then residual and activation in one pass.
at::Tensor conv_through_aten(const at::Tensor& x, const at::Tensor& w, const MaybeTensor& bias,
                             const ConvGeometry& geometry, Activation activation, const MaybeTensor& residual,
                             at::MemoryFormat format);
ThreeTensors conv_backward_through_aten(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                                        const at::Tensor& w, int64_t full_bias, const ConvGeometry& geometry,
                                        bool need_dx, bool need_dw, bool need_db,
                                        GradientSize size = GradientSize::kFull);

// The op's kernels, for callers that are below autograd themselves.
at::Tensor slim_conv_cpu(const at::Tensor& x, const at::Tensor& weight, const MaybeTensor& bias, int64_t out_channels,
                         at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                         c10::string_view activation_name, const MaybeTensor& residual);
template <GradientSize size>
ThreeTensors slim_conv_backward_cpu(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                                    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                    int64_t groups, bool need_dx, bool need_dw, bool need_db);

}  // namespace slimkernels
