#include "slim_conv_depthwise.h"

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

}  // namespace

// Only the weight gradient of kernels above 3 x 3, or on images of at most 2 x 2, runs here, in either layout (contiguous
// tensors are copied): oneDNN's takes 3 to 10 GFLOP/s for 7 x 7, five to ten times longer than this and the copies, and 1.3 ms
// for 960 channels of 2 x 2. Forward, dx and other 3 x 3 are oneDNN's:
// direct kernels of ours that read x unpacked took 1.3 to 2 times its time.
std::pair<at::Tensor, at::Tensor> depthwise_conv_weight_gradient(const at::Tensor& dy, const at::Tensor& x,
                                                                 const at::Tensor& weight, const ConvGeometry& g,
                                                                 bool need_dw, GradientSize size) {
  if (!need_dw || !is_depthwise(x, weight, dy.size(1), g)) return {};
  if (weight.size(2) * weight.size(3) <= 9 && dy.size(2) * dy.size(3) > 4) return {};
  const at::Tensor grad = channels_last_view(dy), in = channels_last_view(x);
  const DepthwiseGradient plan{in.size(0), in.size(1), in.size(2), in.size(3), weight.size(3),
                               in.stride(0), in.stride(2), in.stride(3), grad.stride(0), grad.stride(2), grad.stride(3),
                               line(dy.size(2), weight.size(2), g.stride[0], g.padding[0], g.dilation[0]),
                               line(dy.size(3), weight.size(3), g.stride[1], g.padding[1], g.dilation[1])};
  const int64_t channels = dy.size(1), padded = (channels + 15) / 16 * 16;
  const auto options = x.options().dtype(at::kFloat);
  const at::Tensor sums = at::zeros({weight.size(2), weight.size(3), padded}, options);
  const at::Tensor bias_sums = at::zeros({padded}, options);
  AT_DISPATCH_SWITCH(x.scalar_type(), "slim_conv_backward", SK_CASES_F32_BF16_F16([&] {
    SK_CALL_ISA(depthwise_gradient_kernel, plan, in.const_data_ptr<scalar_t>(), grad.const_data_ptr<scalar_t>(),
                sums.data_ptr<float>(), bias_sums.data_ptr<float>());
  }));
  return {sized_gradient(sums.narrow(2, 0, channels).permute({2, 0, 1}).unsqueeze(1), weight, size),
          sized_bias_gradient(bias_sums, channels, weight.size(0), dy.scalar_type(), size)};
}

}  // namespace slimkernels
