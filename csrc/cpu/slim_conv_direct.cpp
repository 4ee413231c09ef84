#include "slim_conv_direct.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/flip.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>

#define SK_INL "slim_conv_direct-inl.h"
#include "foreach_isa.h"
#include "slim_conv_winograd.h"

namespace slimkernels {
namespace {

// Which shapes run here and not in oneDNN (through ATen), from measurements on one Zen 5 core, channels-last, ours over
// F.conv2d on the slice; oneDNN reaches 200 to 240 GFLOP/s in float32 at 32 channels and more, and so do these kernels.
//   Pointwise (1x1, stride 1) without AVX-512 (with it: slim_conv_pointwise.cpp), dx and dw: 1.1 to 2.2: oneDNN reorders a weight
//   that is read in place here. Forward, large: 0.5 to 0.9.
//   Up to 24 vector channels (of the result's side): 1.1 to 2.9 forward and dx; oneDNN pads to blocks of 16.
//   dx with a stride: 1.15 to 2.5, because each remainder of the stride is a dense convolution of its own.
//   Little work (small batches): 1.2 to 2.8, what oneDNN spends on reordering and on looking up its primitive.
//   dw: only pointwise, little work, and 9 to 15 channels on the narrower side (1.2 to 1.3); its sums over pixels are oneDNN's
//   strong side (0.6 to 1 elsewhere), and so are weights whose sums leave the L2 cache.
//   bfloat16 has its own multiply-add in oneDNN, twice as fast: only little work is left (1.2 to 1.4).
//   float16 without AVX512-FP16 has no oneDNN kernel at all: everything is here.
constexpr int64_t kNarrow = 24, kLittleWork = 20'000'000, kLittleWorkBFloat16 = 4'000'000, kSmallWeight = 64 * 1024;

enum class Direction { kForward, kInputGradient, kWeightGradient };

bool fits(const at::Tensor& x, const at::Tensor& weight, int64_t out_channels, const ConvGeometry& g,
          at::IntArrayRef out_sizes, Direction direction) {
  if (x.dim() != 4 || g.groups != 1 || x.numel() == 0 || conv_format(x, weight) != at::MemoryFormat::ChannelsLast) {
    return false;
  }
  const int64_t weights = out_channels * x.size(1) * weight.size(2) * weight.size(3);
  const int64_t work = weights * x.size(0) * out_sizes[2] * out_sizes[3];
  if (x.scalar_type() == at::kBFloat16) return work <= kLittleWorkBFloat16 && weights <= kSmallWeight / 4;
  const bool pointwise = weight.size(2) * weight.size(3) * g.stride[0] * g.stride[1] == 1;
  const bool strided = g.stride[0] * g.stride[1] > 1;
  if (x.scalar_type() == at::kHalf) return weights <= kSmallWeight || pointwise;
  if (work <= kLittleWork) return weights <= kSmallWeight || (pointwise && direction == Direction::kInputGradient);
  switch (direction) {
    case Direction::kForward: return out_channels <= kNarrow;
    case Direction::kInputGradient: return pointwise || strided || x.size(1) <= kNarrow;
    case Direction::kWeightGradient: {
      const int64_t narrower = std::min(x.size(1), out_channels);
      return weights <= kSmallWeight && (pointwise || (narrower > 8 && narrower < 16));
    }
  }
  return false;
}

// Convolutions of 3x3 and stride 1 in float32 by Winograd's algorithm: 1.1 to 2.4 times as fast for 16 to 64 channels, at 1.5 to 3
// times PyTorch's error against float64, up to 1e-6.
bool winograd_fits(const at::Tensor& in, const at::Tensor& weight, const ConvGeometry& g, bool any_dtype = false) {
  return (any_dtype || in.scalar_type() == at::kFloat) && current_isa() == Isa::kAvx512 && weight.size(2) == 3 &&
         weight.size(3) == 3 && g.groups == 1 && g.stride[0] * g.stride[1] * g.dilation[0] * g.dilation[1] == 1;
}

constexpr int64_t kConvertedBytes = 512 * 1024;  // of x: the images of which are converted at once

// In bfloat16 x and dy are first converted: .4 to .8 of oneDNN's time for 8x8 images and for up to 32 channels of
// 16x16, but no gain for 16 of them, and 1.1 to 1.5 times for 64 to 256 channels of 14x14.
bool gradient_by_winograd(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight, const ConvGeometry& g) {
  const int64_t pixels = x.size(2) * x.size(3);
  const auto [narrower, wider] = std::minmax({x.size(1), dy.size(1)});
  const bool small = pixels <= 64 ? narrower >= 16 && wider <= 128 : pixels <= 256 && narrower > 16 && wider <= 32;
  const bool bfloat16 = x.scalar_type() == at::kBFloat16 && small;
  return winograd_fits(x, weight, g, bfloat16) &&
         winograd_gradient_pays(x.size(0), dy.size(2), dy.size(3), x.size(1), dy.size(1));
}

bool by_winograd(const at::Tensor& in, at::IntArrayRef out, const at::Tensor& weight, const ConvGeometry& g) {
  return winograd_fits(in, weight, g) && winograd_pays(in.size(0), out[2], out[3], in.size(1), out[1]);
}

int64_t vector_lanes() {
  return current_isa() == Isa::kAvx512 ? 16 : current_isa() == Isa::kAvx2 ? 8 : 4;
}

// Channels side by side; any other strides will do.
at::Tensor channels_last_view(const at::Tensor& t) {
  return t.stride(1) == 1 ? t : t.contiguous(at::MemoryFormat::ChannelsLast);
}

WeightView weight_view(const at::Tensor& weight, int64_t out, int64_t in, bool flipped) {
  return {out,
          in,
          weight.size(2),
          weight.size(3),
          weight.stride(0),
          weight.stride(1),
          weight.stride(2),
          weight.stride(3),
          flipped};
}

// Fills in strides, runs and the packed weights' offsets. `rows` and `columns` hold each phase's taps as (kernel position,
// packed offset).
using TapList = std::vector<std::pair<int64_t, int64_t>>;

void add_phase(TapConv& conv, Phase phase, const TapList& rows, const TapList& columns, int64_t kernel_w) {
  const int64_t channels = conv.in_channels;
  for (const auto& [ky, offset_y] : rows) {
    for (const auto& [kx, offset_x] : columns) {
      const int64_t offset = (offset_y * conv.packed_w + offset_x) * channels;
      phase.taps.push_back(ky * kernel_w + kx);
      if (!phase.runs.empty() && phase.runs.back().offset + phase.runs.back().length == offset) {
        phase.runs.back().length += channels;
      } else {
        phase.runs.push_back({offset, channels});
      }
    }
  }
  const int64_t lanes = (conv.out_channels <= vector_lanes() ? 1 : 2) * vector_lanes();
  phase.weights = conv.packed_weights;
  conv.packed_weights += static_cast<int64_t>(phase.taps.size()) * channels *
                         ((conv.out_channels + lanes - 1) / lanes * lanes);
  conv.max_count_y = std::max(conv.max_count_y, phase.count_y);
  conv.phases.push_back(std::move(phase));
}

void set_sizes(TapConv& conv, const at::Tensor& in, const at::Tensor& out) {
  conv.images = in.size(0);
  conv.in_channels = in.size(1);
  conv.in_h = in.size(2);
  conv.in_w = in.size(3);
  conv.out_channels = out.size(1);
  conv.out_h = out.size(2);
  conv.out_w = out.size(3);
  conv.in_stride_n = in.stride(0);
  conv.in_stride_h = in.stride(2);
  conv.in_stride_w = in.stride(3);
  conv.out_stride_n = out.stride(0);
  conv.out_stride_h = out.stride(2);
  conv.out_stride_w = out.stride(3);
  conv.packed_weights = conv.max_count_y = 0;
  conv.activation = Activation::kNone;
}

TapConv plan_forward(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& y, const ConvGeometry& g) {
  TapConv conv;
  set_sizes(conv, x, y);
  conv.pad_top = g.padding[0];
  conv.pad_left = g.padding[1];
  conv.in_step_h = g.stride[0];
  conv.in_step_w = g.stride[1];
  conv.reach_h = (weight.size(2) - 1) * g.dilation[0] + 1;
  conv.packed_w = (conv.out_w - 1) * g.stride[1] + (weight.size(3) - 1) * g.dilation[1] + 1;
  TapList rows, columns;
  for (int64_t k = 0; k < weight.size(2); ++k) rows.emplace_back(k, k * g.dilation[0]);
  for (int64_t k = 0; k < weight.size(3); ++k) columns.emplace_back(k, k * g.dilation[1]);
  add_phase(conv, {0, 0, 1, 1, conv.out_h, conv.out_w, {}, {}, 0}, rows, columns, weight.size(3));
  return conv;
}

// The taps of remainder r along one dimension: input position s * i + r takes output i + (r + pad - k * dilation) / s.
TapList taps_of_remainder(int64_t r, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  TapList taps;
  for (int64_t k = kernel - 1; k >= 0; --k) {  // descending kernel positions are ascending offsets
    const int64_t distance = r + pad - k * dilation;
    if (distance % stride == 0) taps.emplace_back(k, distance / stride);
  }
  return taps;
}

TapConv plan_input_gradient(const at::Tensor& dy, const at::Tensor& weight, const at::Tensor& dx,
                            const ConvGeometry& g) {
  TapConv conv;
  set_sizes(conv, dy, dx);
  conv.in_step_h = conv.in_step_w = 1;
  std::vector<TapList> taps[2];
  int64_t low[2] = {0, 0}, high[2] = {0, 0};
  for (int d = 0; d < 2; ++d) {
    for (int64_t r = 0; r < g.stride[d]; ++r) {
      taps[d].push_back(taps_of_remainder(r, weight.size(2 + d), g.stride[d], g.padding[d], g.dilation[d]));
      for (const auto& [k, offset] : taps[d].back()) {
        low[d] = std::min(low[d], offset);
        high[d] = std::max(high[d], offset);
      }
    }
    for (TapList& list : taps[d]) {
      for (auto& tap : list) tap.second -= low[d];
    }
  }
  conv.pad_top = -low[0];
  conv.pad_left = -low[1];
  conv.reach_h = high[0] - low[0] + 1;
  conv.packed_w = (conv.out_w - 1) / g.stride[1] + high[1] - low[1] + 1;
  for (int64_t y = 0; y < std::min(g.stride[0], conv.out_h); ++y) {
    for (int64_t x = 0; x < std::min(g.stride[1], conv.out_w); ++x) {
      const int64_t count_y = (conv.out_h - y - 1) / g.stride[0] + 1, count_x = (conv.out_w - x - 1) / g.stride[1] + 1;
      add_phase(conv, {y, x, g.stride[0], g.stride[1], count_y, count_x, {}, {}, 0}, taps[0][y], taps[1][x],
                weight.size(3));
    }
  }
  return conv;
}

at::Tensor weight_gradient(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight, const ConvGeometry& g,
                           bool need_dw, at::Tensor& db) {
  WeightGradient plan{x.size(0), x.size(2), x.size(3), x.size(1), dy.size(2), dy.size(3), dy.size(1),
                      x.stride(0), x.stride(2), x.stride(3), dy.stride(0), dy.stride(2), dy.stride(3),
                      g.padding[0], g.padding[1], 0, g.stride[0], g.stride[1], g.dilation[0], g.dilation[1],
                      weight.size(2), weight.size(3)};
  plan.packed_w = (plan.out_w - 1) * plan.stride_w + (plan.kernel_w - 1) * plan.dilation_w + 1;
  const int64_t lanes = vector_lanes(), padded = (plan.out_channels + lanes - 1) / lanes * lanes;
  const auto options = x.options().dtype(at::kFloat);
  at::Tensor sums = at::zeros({plan.kernel_h, plan.kernel_w, plan.in_channels, padded}, options);
  db = at::zeros({padded}, options);
  AT_DISPATCH_SWITCH(x.scalar_type(), "slim_conv_backward", SK_CASES_F32_BF16_F16([&] {
    SK_CALL_ISA(weight_gradient_kernel, plan, x.const_data_ptr<scalar_t>(), dy.const_data_ptr<scalar_t>(), need_dw,
                sums.data_ptr<float>(), db.data_ptr<float>());
  }));
  return sums.narrow(3, 0, plan.out_channels).permute({3, 2, 0, 1});
}

// Channels of the result that leave half a vector empty or more: how many neighbours of a row share one vector. With them as
// output channels the convolution has a kernel that is wider by their distance: 4 taps a row for two pixels of a 3x3 kernel
// instead of 6, 6 for four instead of 12.
int64_t pixels_together(const at::Tensor& y, int64_t kernel_w) {
  if (kernel_w == 1) return 1;
  for (const int64_t count : {4, 2}) {
    if (count * y.size(1) <= vector_lanes() && y.size(3) % count == 0) return count;
  }
  return 1;
}

// The weight of that convolution: filter (pixel, o) is filter o, moved by the pixel's distance from the first.
at::Tensor shifted_filters(const at::Tensor& weight, int64_t pixels, int64_t stride, int64_t dilation) {
  const int64_t reach = (weight.size(3) - 1) * dilation + 1, filters = weight.size(0);
  at::Tensor out = at::zeros({pixels * filters, weight.size(1), weight.size(2), (pixels - 1) * stride + reach}, weight.options());
  for (int64_t p = 0; p < pixels; ++p) {
    out.narrow(0, p * filters, filters).slice(3, p * stride, p * stride + reach, dilation).copy_(weight);
  }
  return out;
}

// The first `filters` entries, `pixels` times, padded to whole vectors; empty without a bias.
std::vector<float> bias_floats(const MaybeTensor& bias, int64_t filters, int64_t pixels) {
  std::vector<float> out;
  if (!bias) return out;
  const at::Tensor values = bias->to(at::kFloat).contiguous();
  for (int64_t p = 0; p < pixels; ++p) {
    out.insert(out.end(), values.const_data_ptr<float>(), values.const_data_ptr<float>() + filters);
  }
  out.resize((out.size() + 15) / 16 * 16);
  return out;
}

// y <- act(conv + bias + residual) for a weight of the active size; y is dense.
void run_forward(const at::Tensor& in, const at::Tensor& active, const MaybeTensor& bias, at::Tensor& y, const ConvGeometry& g,
                 Activation activation, const MaybeTensor& residual) {
  const int64_t filters = active.size(0), pixels = pixels_together(y, active.size(3));
  MaybeTensor r;
  if (residual) r = same_layout(*residual, y);
  const std::vector<float> b = bias_floats(bias, filters, pixels);
  at::Tensor weight = active, to = y;
  const int64_t strides[2] = {g.stride[0], g.stride[1] * pixels}, dilations[2] = {g.dilation[0], pixels > 1 ? 1 : g.dilation[1]};
  if (pixels > 1) {
    weight = shifted_filters(active, pixels, g.stride[1], g.dilation[1]);
    to = y.as_strided({y.size(0), pixels * filters, y.size(2), y.size(3) / pixels},
                      {y.stride(0), 1, y.stride(2), pixels * filters});
  }
  TapConv conv = plan_forward(in, weight, to, {strides, g.padding, g.output_padding, dilations, 1, false});
  conv.activation = activation;
  const WeightView view = weight_view(weight, weight.size(0), weight.size(1), false);
  AT_DISPATCH_SWITCH(in.scalar_type(), "slim_conv", SK_CASES_F32_BF16_F16([&] {
    SK_CALL_ISA(tap_conv_kernel, conv, in.const_data_ptr<scalar_t>(), view, weight.const_data_ptr<scalar_t>(),
                bias ? b.data() : nullptr, r ? r->const_data_ptr<scalar_t>() : nullptr, y.data_ptr<scalar_t>());
  }));
}

}  // namespace

std::optional<at::Tensor> direct_conv(const at::Tensor& x, const at::Tensor& weight, const MaybeTensor& bias,
                                      int64_t out_channels, const ConvGeometry& g, Activation activation,
                                      const MaybeTensor& residual) {
  const c10::DimVector sizes = conv_output_sizes(x, weight, out_channels, g);
  if (x.dim() != 4 || x.numel() == 0 || conv_format(x, weight) != at::MemoryFormat::ChannelsLast) return std::nullopt;
  const bool winograd = by_winograd(x, sizes, weight, g);
  if (!winograd && !fits(x, weight, out_channels, g, sizes, Direction::kForward)) return std::nullopt;
  at::Tensor y = at::empty(sizes, x.options().memory_format(at::MemoryFormat::ChannelsLast));
  if (winograd) {
    const WeightView view = weight_view(weight, out_channels, x.size(1), false);
    const std::vector<float> b = bias_floats(bias, out_channels, 1);
    winograd_conv(channels_last_view(x), weight, view, bias ? b.data() : nullptr, y, g.padding[0], g.padding[1]);
    add_activate(y, residual, activation);
    return y;
  }
  const at::Tensor active = weight.narrow(0, 0, out_channels).narrow(1, 0, x.size(1));
  run_forward(channels_last_view(x), active, bias, y, g, activation, residual);
  return y;
}

at::Tensor direct_conv_input_gradient(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                                      const ConvGeometry& g) {
  if (x.dim() != 4 || x.numel() == 0 || conv_format(x, weight) != at::MemoryFormat::ChannelsLast) return {};
  const bool winograd = by_winograd(dy, x.sizes(), weight, g);
  if (!winograd && !fits(x, weight, dy.size(1), g, dy.sizes(), Direction::kInputGradient)) return {};
  const at::Tensor grad = channels_last_view(dy);
  at::Tensor dx = at::empty(x.sizes(), x.options().memory_format(at::MemoryFormat::ChannelsLast));
  const int64_t pads[2] = {g.dilation[0] * (weight.size(2) - 1) - g.padding[0],
                           g.dilation[1] * (weight.size(3) - 1) - g.padding[1]};
  if (winograd) {
    winograd_conv(grad, weight, weight_view(weight, dy.size(1), x.size(1), true), nullptr, dx, pads[0], pads[1]);
    return dx;
  }
  if (g.stride[0] * g.stride[1] == 1 && pads[0] >= 0 && pads[1] >= 0 && pixels_together(dx, weight.size(3)) > 1) {
    const at::Tensor active = weight.narrow(0, 0, dy.size(1)).narrow(1, 0, x.size(1));
    const ConvGeometry reversed{g.stride, pads, g.output_padding, g.dilation, 1, false};
    run_forward(grad, at::flip(active, {2, 3}).transpose(0, 1), std::nullopt, dx, reversed, Activation::kNone, std::nullopt);
    return dx;
  }
  const TapConv conv = plan_input_gradient(grad, weight, dx, g);
  const WeightView view = weight_view(weight, dy.size(1), x.size(1), true);
  AT_DISPATCH_SWITCH(x.scalar_type(), "slim_conv_backward", SK_CASES_F32_BF16_F16([&] {
    SK_CALL_ISA(tap_conv_kernel, conv, grad.const_data_ptr<scalar_t>(), view, weight.const_data_ptr<scalar_t>(),
                static_cast<const float*>(nullptr), static_cast<const scalar_t*>(nullptr), dx.data_ptr<scalar_t>());
  }));
  return dx;
}

std::pair<at::Tensor, at::Tensor> direct_conv_weight_gradient(const at::Tensor& dy, const at::Tensor& x,
                                                              const at::Tensor& weight, const ConvGeometry& g,
                                                              bool need_dw, GradientSize size) {
  if (x.dim() != 4 || x.numel() == 0 || conv_format(x, weight) != at::MemoryFormat::ChannelsLast) return {};
  if (need_dw && gradient_by_winograd(dy, x, weight, g)) {
    at::Tensor dw = at::empty({dy.size(1), x.size(1), 3, 3},
                              x.options().dtype(at::kFloat).memory_format(at::MemoryFormat::ChannelsLast));
    const at::Tensor grad = channels_last_view(dy), in = channels_last_view(x);
    const int64_t images = x.size(0), bytes = x.numel() / images * static_cast<int64_t>(sizeof(float));
    const int64_t together = x.scalar_type() == at::kFloat ? images : std::max<int64_t>(8, kConvertedBytes / bytes);
    for (int64_t i = 0; i < images; i += together) {
      const int64_t count = std::min(together, images - i);
      at::Tensor part = i == 0 ? dw : at::empty_like(dw);
      winograd_gradient(grad.narrow(0, i, count).to(at::kFloat), in.narrow(0, i, count).to(at::kFloat), part,
                        g.padding[0], g.padding[1]);
      if (i > 0) dw.add_(part);
    }
    return {sized_gradient(dw, weight, size), at::Tensor()};
  }
  if (!fits(x, weight, dy.size(1), g, dy.sizes(), Direction::kWeightGradient)) return {};
  at::Tensor sums;
  const at::Tensor part = weight_gradient(channels_last_view(dy), channels_last_view(x), weight, g, need_dw, sums);
  return {need_dw ? sized_gradient(part, weight, size) : at::empty({0}, dy.options()),
          sized_bias_gradient(sums, dy.size(1), weight.size(0), dy.scalar_type(), size)};
}

}  // namespace slimkernels
