// Weight gradient of a depthwise convolution: what the entry prepares and the kernels read.
#pragma once

#include <utility>
#include <vector>

#include "slim_conv.h"

namespace slimkernels {

// A kernel position along one dimension and the input position it reads, relative to the pixel's.
struct DepthwiseTap {
  int64_t kernel, offset;
};

// Output positions i < count along one dimension; each tap reads input position i * in_step + offset.
struct DepthwiseLine {
  int64_t count, in_step;
  std::vector<DepthwiseTap> taps;
};

struct DepthwiseGradient {
  int64_t images, channels, in_h, in_w, kernel_w;
  int64_t in_stride_n, in_stride_h, in_stride_w, dy_stride_n, dy_stride_h, dy_stride_w;
  DepthwiseLine row, column;
};

// dw and db, both of `size`, or nothing (undefined tensors) when the shape is PyTorch's: see slim_conv_depthwise.cpp.
std::pair<at::Tensor, at::Tensor> depthwise_conv_weight_gradient(const at::Tensor& dy, const at::Tensor& x,
                                                                 const at::Tensor& weight, const ConvGeometry& geometry,
                                                                 bool need_dw, GradientSize size);

}  // namespace slimkernels
