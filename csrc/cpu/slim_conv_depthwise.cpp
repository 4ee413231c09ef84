#include "slim_conv_depthwise.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <type_traits>

#define SK_INL "slim_conv_depthwise-inl.h"
#include "foreach_isa.h"

namespace slimkernels {
namespace {

bool is_depthwise(const at::Tensor& x, const at::Tensor& weight, int64_t out_channels, const ConvGeometry& g) {
  return x.dim() == 4 && g.groups == x.size(1) && out_channels == g.groups && g.groups > 1 && x.numel() > 0 &&
         weight.numel() > 0;
}

at::Tensor channels_last_view(const at::Tensor& t) {
  return t.stride(1) == 1 ? t : t.contiguous(at::MemoryFormat::ChannelsLast);
}

DepthwiseLine line(int64_t count, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  DepthwiseLine line{count, stride, {}};
  for (int64_t k = 0; k < kernel; ++k) line.taps.push_back({k, k * dilation - pad});
  return line;
}

DepthwiseReaders readers(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  DepthwiseReaders found;
  found.of.resize(in);
  for (int64_t k = 0; k < kernel; ++k) {
    for (int64_t i = 0; i < out; ++i) {
      const int64_t at = i * stride + k * dilation - pad;
      if (at < 0 || at >= in) continue;
      found.of[at].emplace_back(k, i);
      found.most = std::max<int64_t>(found.most, found.of[at].size());
    }
  }
  return found;
}

}  // namespace

// With a stride: oneDNN has no kernel for it in 16 bits (in bfloat16, 32 images of 16x16 and 144 channels, 22 ms; here
// .3). Float32 stays there: layers take .5 to 1.5 of its time here, and MobileNetV2's training step gains nothing.
at::Tensor depthwise_conv_input_gradient(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                                         const ConvGeometry& g) {
  if (!is_depthwise(x, weight, dy.size(1), g) || g.stride[0] * g.stride[1] == 1) return {};
  if (x.scalar_type() == at::kFloat) return {};
  const at::Tensor grad = channels_last_view(dy);
  const int64_t channels = dy.size(1), padded = (channels + 15) / 16 * 16;
  const DepthwiseInput plan{x.size(0),
                            channels,
                            x.size(2),
                            x.size(3),
                            weight.size(3),
                            grad.stride(0),
                            grad.stride(2),
                            grad.stride(3),
                            readers(x.size(2), dy.size(2), weight.size(2), g.stride[0], g.padding[0], g.dilation[0]),
                            readers(x.size(3), dy.size(3), weight.size(3), g.stride[1], g.padding[1], g.dilation[1])};
  const at::Tensor taps = at::zeros({weight.size(2), weight.size(3), padded}, x.options().dtype(at::kFloat));
  taps.narrow(2, 0, channels).copy_(weight.narrow(0, 0, channels).select(1, 0).permute({1, 2, 0}));
  const at::Tensor dx = at::empty(x.sizes(), x.options().memory_format(at::MemoryFormat::ChannelsLast));
  AT_DISPATCH_SWITCH(x.scalar_type(), "slim_conv_backward", SK_CASES_F32_BF16_F16([&] {
                       SK_CALL_ISA(depthwise_input_kernel, plan, grad.const_data_ptr<scalar_t>(),
                                   taps.const_data_ptr<float>(), dx.data_ptr<scalar_t>());
                     }));
  return dx.contiguous(conv_format(x, weight));
}

// Only the weight gradient of kernels above 3 x 3, or on images of at most 2 x 2, runs here, in either layout
// (contiguous tensors are copied): oneDNN's takes 3 to 10 GFLOP/s for 7 x 7, five to ten times longer than this and the
// copies, and 1.3 ms for 960 channels of 2 x 2. Forward, dx without a stride and other 3 x 3 are oneDNN's: direct
// kernels of ours that read x unpacked took 1.3 to 2 times its time.
std::pair<at::Tensor, at::Tensor> depthwise_conv_weight_gradient(const at::Tensor& dy, const at::Tensor& x,
                                                                 const at::Tensor& weight, const ConvGeometry& g,
                                                                 bool need_dw, GradientSize size) {
  if (!need_dw || !is_depthwise(x, weight, dy.size(1), g)) return {};
  if (weight.size(2) * weight.size(3) <= 9 && dy.size(2) * dy.size(3) > 4) return {};
  const at::Tensor grad = channels_last_view(dy), in = channels_last_view(x);
  const DepthwiseGradient plan{in.size(0),
                               in.size(1),
                               in.size(2),
                               in.size(3),
                               weight.size(3),
                               in.stride(0),
                               in.stride(2),
                               in.stride(3),
                               grad.stride(0),
                               grad.stride(2),
                               grad.stride(3),
                               line(dy.size(2), weight.size(2), g.stride[0], g.padding[0], g.dilation[0]),
                               line(dy.size(3), weight.size(3), g.stride[1], g.padding[1], g.dilation[1])};
  const int64_t channels = dy.size(1), padded = (channels + 15) / 16 * 16;
  const auto options = x.options().dtype(at::kFloat);
  const at::Tensor sums = at::zeros({weight.size(2), weight.size(3), padded}, options);
  const at::Tensor bias_sums = at::zeros({padded}, options);
  AT_DISPATCH_SWITCH(x.scalar_type(), "slim_conv_backward", SK_CASES_F32_BF16_F16([&] {
                       SK_CALL_ISA(depthwise_gradient_kernel, plan, in.const_data_ptr<scalar_t>(),
                                   grad.const_data_ptr<scalar_t>(), sums.data_ptr<float>(),
                                   bias_sums.data_ptr<float>());
                     }));
  return {sized_gradient(sums.narrow(2, 0, channels).permute({2, 0, 1}).unsqueeze(1), weight, size),
          sized_bias_gradient(bias_sums, channels, weight.size(0), dy.scalar_type(), size)};
}

}  // namespace slimkernels
