// Gradients of a depthwise convolution: what the entry prepares and the kernels read.
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

// Along one dimension: for each input position the kernel positions and output positions that read it.
struct DepthwiseReaders {
  std::vector<std::vector<std::pair<int64_t, int64_t>>> of;
  int64_t most = 0;
};

struct DepthwiseInput {
  int64_t images, channels, in_h, in_w, kernel_w, dy_stride_n, dy_stride_h, dy_stride_w;
  DepthwiseReaders rows, columns;
};

// dx, or nothing when the shape is PyTorch's.
at::Tensor depthwise_conv_input_gradient(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                                         const ConvGeometry& geometry);

// dw and db, both of `size`, or nothing (undefined tensors) when the shape is PyTorch's: see slim_conv_depthwise.cpp.
std::pair<at::Tensor, at::Tensor> depthwise_conv_weight_gradient(const at::Tensor& dy, const at::Tensor& x,
                                                                 const at::Tensor& weight, const ConvGeometry& geometry,
                                                                 bool need_dw, GradientSize size);

}  // namespace slimkernels
