// Direct convolution in channels-last for narrow layers: what the entry prepares and the kernels read.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "slim_conv.h"

namespace slimkernels {

// `length` input values that lie side by side from `offset` on, relative to a pixel's first value in the packed input.
struct Run {
  int64_t offset, length;
};

// Output pixels (first_y + i * step_y, first_x + j * step_x), all fed by the same taps. A forward convolution is one phase;
// the gradient of the input of a strided one has a phase for each remainder.
struct Phase {
  int64_t first_y, first_x, step_y, step_x, count_y, count_x;
  std::vector<Run> runs;
  std::vector<int64_t> taps;  // kernel positions in the order of the runs' values
  int64_t weights;            // offset of the phase's packed weights
};

// Sizes and strides of a convolution as sums over taps; strides in elements, channels lie side by side.
struct TapConv {
  int64_t images, in_h, in_w, in_channels, out_h, out_w, out_channels;
  int64_t in_stride_n, in_stride_h, in_stride_w, out_stride_n, out_stride_h, out_stride_w;
  int64_t pad_top, pad_left, packed_w;  // packed row r, column c is input row r - pad_top, column c - pad_left, else 0
  int64_t reach_h;                      // packed rows that one output row needs
  int64_t in_step_h, in_step_w;
  int64_t max_count_y;
  std::vector<Phase> phases;
  int64_t packed_weights;  // floats in all
  Activation activation;
};

// The weight of a convolution, any strides: value (o, i, tap) at o * stride_o + i * stride_i + y * stride_y + x * stride_x.
struct WeightView {
  int64_t out, in, kernel_h, kernel_w, stride_o, stride_i, stride_y, stride_x;
  bool flipped;  // sums over o (gradient of the input) instead of over i
};

// Sizes of the gradient of the weight: dw (kernel_h, kernel_w * in_channels, out_channels padded) over packed bands.
struct WeightGradient {
  int64_t images, in_h, in_w, in_channels, out_h, out_w, out_channels;
  int64_t in_stride_n, in_stride_h, in_stride_w, dy_stride_n, dy_stride_h, dy_stride_w;
  int64_t pad_top, pad_left, packed_w, stride_h, stride_w, dilation_h, dilation_w, kernel_h, kernel_w;
};

// The result, or nothing (undefined tensors) when the shape is PyTorch's: see the rule in slim_conv_direct.cpp.
std::optional<at::Tensor> direct_conv(const at::Tensor& x, const at::Tensor& weight, const MaybeTensor& bias,
                                      int64_t out_channels, const ConvGeometry& geometry, Activation activation,
                                      const MaybeTensor& residual);
at::Tensor direct_conv_input_gradient(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                                      const ConvGeometry& geometry);
// dw (an empty tensor when not needed) and db, both of `size`.
std::pair<at::Tensor, at::Tensor> direct_conv_weight_gradient(const at::Tensor& dy, const at::Tensor& x,
                                                              const at::Tensor& weight, const ConvGeometry& geometry,
                                                              bool need_dw, GradientSize size);

}  // namespace slimkernels
