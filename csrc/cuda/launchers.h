// What the CUDA sources offer: plain pointers, sizes and a stream; no torch. Every launcher returns a cudaError_t.
#pragma once

#include <stdint.h>

enum SkDtype { kSkFloat = 0, kSkBfloat16 = 1, kSkHalf = 2 };

// A depthwise convolution: output channel c reads input channel c / (outputs / channels). Strides are in numbers; the
// four dimensions are batch, channel, height, width. A 1d convolution has height 1.
struct SkDepthwise {
  int64_t batch, channels, outputs;
  int64_t in[2], out[2], kernel[2], stride[2], padding[2], dilation[2];
  int64_t x_stride[4], y_stride[4], weight_stride[3];  // weight: channel, kernel row, kernel column
};

// target[leading slice of source's shape] += source. The source is contiguous.
constexpr int kSkSliceDims = 5;
struct SkSlice {
  void* target;
  const void* source;
  int64_t size[kSkSliceDims], stride[kSkSliceDims];  // of the slice; the target's strides. Unused dimensions: size 1
};

extern "C" {
// y = act(conv(x, weight) + bias + residual). bias and residual may be null; residual has y's strides.
int sk_depthwise_forward(const SkDepthwise* shape, const void* x, const void* weight, const void* bias,
                         const void* residual, void* y, int activation, int dtype, void* stream);
// dx has the strides x_stride, dy y_stride.
int sk_depthwise_input_gradient(const SkDepthwise* shape, const void* dy, const void* weight, void* dx, int dtype,
                                void* stream);
// Writes the first `outputs` rows of dw. `scratch` holds sk_depthwise_scratch floats.
int64_t sk_depthwise_scratch(const SkDepthwise* shape);
int sk_depthwise_weight_gradient(const SkDepthwise* shape, const void* dy, const void* x, void* dw, float* scratch,
                                 int dtype, void* stream);

int sk_slice_accumulate(const SkSlice* slices, int64_t count, int target_dtype, int source_dtype, void* stream);
}
