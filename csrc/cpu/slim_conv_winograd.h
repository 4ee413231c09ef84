// 3x3 convolution of stride 1 by Winograd's algorithm, channels-last, float32: what the entry prepares and the kernel
// reads.
#pragma once

#include "slim_conv_direct.h"

namespace slimkernels {

// The image is that of the direct kernels: row y of the output reads rows y - pad_top to y - pad_top + 2 of the input.
struct WinogradConv {
  int64_t images, in_h, in_w, in_channels, out_h, out_w, out_channels;
  int64_t in_stride_n, in_stride_h, in_stride_w, out_stride_n, out_stride_h, out_stride_w;
  int64_t pad_top, pad_left;
  int64_t block;  // tiles of 4x4 outputs worked on together
};

// Whether these convolutions run here: `in` and `out` are the channels of what is read and of the result.
bool winograd_pays(int64_t images, int64_t out_h, int64_t out_w, int64_t in, int64_t out);

// y <- conv(in) + bias for a 3x3 kernel with stride and dilation 1; y is dense and channels-last, `bias` padded to
// whole vectors or null. `view.flipped` gives the gradient of the input.
void winograd_conv(const at::Tensor& in, const at::Tensor& weight, const WeightView& view, const float* bias,
                   at::Tensor& y, int64_t pad_top, int64_t pad_left);

// The gradient of such a convolution's weight: dw (dy's channels, x's, 3, 3), dense and channels-last.
bool winograd_gradient_pays(int64_t images, int64_t out_h, int64_t out_w, int64_t in, int64_t out);
void winograd_gradient(const at::Tensor& dy, const at::Tensor& x, at::Tensor& dw, int64_t pad_top, int64_t pad_left);

}  // namespace slimkernels
