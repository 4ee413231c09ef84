#include "slim_conv.h"

#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cstring>

#define SK_INL "slim_conv_epilogue-inl.h"
#include "foreach_isa.h"

namespace slimkernels {
namespace {

void check_per_dimension(const char* op, const char* name, at::IntArrayRef values, int64_t spatial, int64_t low) {
  TORCH_CHECK_VALUE(static_cast<int64_t>(values.size()) == spatial &&
                        std::all_of(values.begin(), values.end(), [low](int64_t v) { return v >= low; }),
                    op, ": expected ", name, " to be ", spatial, " integers of at least ", low, ", got ", values);
}

void check_range(const char* op, const char* name, int64_t active, int64_t full) {
  TORCH_CHECK_VALUE(active >= 1 && active <= full, op, ": expected ", name, " between 1 and ", full, ", got ", active);
}

void check_groups(const char* op, const char* name, int64_t channels, int64_t groups) {
  TORCH_CHECK_VALUE(groups >= 1 && channels % groups == 0, op, ": expected ", name, " to be a multiple of groups=",
                    groups, ", got ", channels);
}

// out (out channels, taps, in) <- w (out channels, in, taps), `row` apart; eight bytes of a tap's channels at once.
template <typename Bits>
void taps_to_channels_last(const Bits* w, Bits* out, int64_t filters, int64_t row, int64_t channels, int64_t taps) {
  constexpr int64_t kTogether = sizeof(uint64_t) / sizeof(Bits);
  for (int64_t o = 0; o < filters; ++o, w += row, out += channels * taps) {
    int64_t c = 0;
    for (; c + kTogether <= channels; c += kTogether) {
      for (int64_t t = 0; t < taps; ++t) {
        uint64_t together = 0;
        for (int64_t i = 0; i < kTogether; ++i) together |= static_cast<uint64_t>(w[(c + i) * taps + t]) << (8 * sizeof(Bits) * i);
        std::memcpy(out + t * channels + c, &together, sizeof(together));
      }
    }
    for (; c < channels; ++c) {
      for (int64_t t = 0; t < taps; ++t) out[t * channels + c] = w[c * taps + t];
    }
  }
}

// oneDNN takes a slice in the layout of x. PyTorch would copy a contiguous one into channels-last number by number, which for
// large weights takes as long as the convolution of a small image.
at::Tensor laid_out(const at::Tensor& w, at::MemoryFormat format, bool transposed) {
  if (format != at::MemoryFormat::ChannelsLast || transposed || w.dim() != 4 || w.element_size() > 4) return w;
  const int64_t filters = w.size(0), channels = w.size(1), taps = w.size(2) * w.size(3);
  if (taps == 1 || channels == 1 || w.stride(1) != taps || !w.select(0, 0).is_contiguous()) return w;
  at::Tensor out = at::empty(w.sizes(), w.options().memory_format(format));
  if (w.element_size() == 2) {
    taps_to_channels_last(static_cast<const uint16_t*>(w.const_data_ptr()), static_cast<uint16_t*>(out.data_ptr()), filters,
                          w.stride(0), channels, taps);
  } else {
    taps_to_channels_last(static_cast<const uint32_t*>(w.const_data_ptr()), static_cast<uint32_t*>(out.data_ptr()), filters,
                          w.stride(0), channels, taps);
  }
  return out;
}

// The leading corner of zeros in one pass, where both lie in memory in the same order; undefined elsewhere.
at::Tensor in_corner(const at::Tensor& part, const at::Tensor& full) {
  if (part.scalar_type() != full.scalar_type()) return {};
  const bool last = full.dim() == 4 && full.is_contiguous(at::MemoryFormat::ChannelsLast) && part.is_contiguous(at::MemoryFormat::ChannelsLast);
  if (!last && !(full.is_contiguous() && part.is_contiguous())) return {};
  const int64_t taps = full.numel() / (full.size(0) * full.size(1)), bytes = full.element_size();
  const int64_t rows = part.size(0) * (last ? taps : 1), run = part.size(1) * (last ? 1 : taps) * bytes,
                step = full.size(1) * (last ? 1 : taps) * bytes;
  at::Tensor out = at::empty_like(full);
  char* to = static_cast<char*>(out.data_ptr());
  const char* from = static_cast<const char*>(part.const_data_ptr());
  for (int64_t r = 0; r < rows; ++r, to += step, from += run) {
    std::memcpy(to, from, run);
    std::memset(to + run, 0, step - run);
  }
  std::memset(to, 0, full.numel() * bytes - rows * step);
  return out;
}

}  // namespace

void check_conv(const char* op, const at::Tensor& x, const at::Tensor& weight, const MaybeTensor& bias,
                int64_t out_channels, const ConvGeometry& g) {
  const int64_t spatial = weight.dim() - 2;
  TORCH_CHECK_VALUE(spatial >= 1 && spatial <= 3, op, ": expected weight to have 3 to 5 dimensions, got shape ",
                    weight.sizes());
  TORCH_CHECK_VALUE(x.dim() == spatial + 2, op, ": expected x to have ", spatial + 2, " dimensions, got shape ",
                    x.sizes());
  check_groups(op, "x's channels", x.size(1), g.groups);
  check_groups(op, "out_channels", out_channels, g.groups);
  if (g.transposed) {
    check_range(op, "x's channels", x.size(1), weight.size(0));
    check_range(op, "out_channels", out_channels, weight.size(1) * g.groups);
  } else {
    check_range(op, "x's channels / groups", x.size(1) / g.groups, weight.size(1));
    check_range(op, "out_channels", out_channels, weight.size(0));
  }
  check_per_dimension(op, "stride", g.stride, spatial, 1);
  check_per_dimension(op, "padding", g.padding, spatial, 0);
  check_per_dimension(op, "output_padding", g.output_padding, spatial, 0);
  check_per_dimension(op, "dilation", g.dilation, spatial, 1);
  TORCH_CHECK_TYPE(weight.scalar_type() == x.scalar_type(), op, ": expected weight of dtype ", x.scalar_type(),
                   " like x, got ", weight.scalar_type());
  if (bias) {
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) >= out_channels, op, ": expected bias of shape (N,) with N at least ",
                      out_channels, ", got ", bias->sizes());
    TORCH_CHECK_TYPE(bias->scalar_type() == x.scalar_type(), op, ": expected bias of dtype ", x.scalar_type(),
                     " like x, got ", bias->scalar_type());
  }
}

at::MemoryFormat conv_format(const at::Tensor& x, const at::Tensor& weight) {
  if (x.dim() < 4) return at::MemoryFormat::Contiguous;
  const at::MemoryFormat format = x.suggest_memory_format();
  return format != at::MemoryFormat::Contiguous ? format : weight.suggest_memory_format();
}

bool conv_takes(const at::Tensor& t) {
  return t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16 || t.scalar_type() == at::kHalf;
}

c10::DimVector conv_output_sizes(const at::Tensor& x, const at::Tensor& weight, int64_t out_channels,
                                 const ConvGeometry& g) {
  c10::DimVector sizes = {x.size(0), out_channels};
  for (int64_t d = 0; d < x.dim() - 2; ++d) {
    const int64_t reach = g.dilation[d] * (weight.size(d + 2) - 1) + 1;
    const int64_t room = x.size(d + 2) + 2 * g.padding[d] - reach;
    TORCH_CHECK_VALUE(room >= 0, "slim_conv: expected x to be at least as large as the dilated kernel ",
                      weight.sizes().slice(2), " after padding, got shape ", x.sizes());
    sizes.push_back(room / g.stride[d] + 1);
  }
  return sizes;
}

at::Tensor same_layout(const at::Tensor& residual, const at::Tensor& y) {
  TORCH_CHECK_VALUE(residual.sizes() == y.sizes() && residual.scalar_type() == y.scalar_type(),
                    "slim_conv: expected residual of shape ", y.sizes(), " and dtype ", y.scalar_type(), ", got ",
                    residual.sizes(), " ", residual.scalar_type());
  return residual.strides() == y.strides() ? residual : at::empty_like(y).copy_(residual);
}

void add_activate(at::Tensor& y, const MaybeTensor& residual, Activation activation) {
  if (!residual && activation == Activation::kNone) return;
  at::Tensor r;
  if (residual) {
    r = same_layout(*residual, y);
  }
  AT_DISPATCH_SWITCH(y.scalar_type(), "add_activate", SK_CASES_F32_BF16_F16([&] {
    SK_CALL_ISA(add_activate_kernel, y.data_ptr<scalar_t>(), residual ? r.const_data_ptr<scalar_t>() : nullptr,
                y.numel(), activation);
  }));
}

at::Tensor channel_sums(const at::Tensor& dy) {
  const bool pixels = dy.dim() == 4 && dy.is_contiguous(at::MemoryFormat::ChannelsLast);
  if (!pixels || !conv_takes(dy)) {
    c10::DimVector others = {0};
    for (int64_t d = 2; d < dy.dim(); ++d) others.push_back(d);
    return at::sum(dy, others, false, at::kFloat);
  }
  at::Tensor sums = at::empty({dy.size(1)}, dy.options().dtype(at::kFloat));
  AT_DISPATCH_SWITCH(dy.scalar_type(), "channel_sums", SK_CASES_F32_BF16_F16([&] {
    SK_CALL_ISA(channel_sums_kernel, dy.const_data_ptr<scalar_t>(), dy.numel() / dy.size(1), dy.size(1), dy.size(1),
                sums.data_ptr<float>());
  }));
  return sums;
}

at::Tensor sized_gradient(const at::Tensor& part, const at::Tensor& full, GradientSize size) {
  if (size == GradientSize::kSlice) return part.to(full.scalar_type()).contiguous(full.suggest_memory_format());
  if (part.sizes() == full.sizes()) {
    const bool as_is = part.strides() == full.strides() && part.scalar_type() == full.scalar_type();
    return as_is ? part : at::empty_like(full).copy_(part);
  }
  if (at::Tensor out = in_corner(part, full); out.defined()) return out;
  at::Tensor out = at::zeros_like(full);
  out.narrow(0, 0, part.size(0)).narrow(1, 0, part.size(1)).copy_(part);
  return out;
}

at::Tensor sized_bias_gradient(const at::Tensor& sums, int64_t active, int64_t full, at::ScalarType dtype, GradientSize size) {
  if (sums.size(0) == (size == GradientSize::kSlice ? active : full) && active == sums.size(0) && sums.scalar_type() == dtype) {
    return sums;
  }
  const int64_t entries = size == GradientSize::kSlice ? active : full;
  if (sums.scalar_type() == dtype && sums.is_contiguous()) {
    at::Tensor out = at::empty({entries}, sums.options());
    const size_t bytes = active * sums.element_size(), rest = (entries - active) * sums.element_size();
    std::memcpy(out.data_ptr(), sums.const_data_ptr(), bytes);
    std::memset(static_cast<char*>(out.data_ptr()) + bytes, 0, rest);
    return out;
  }
  at::Tensor out = at::zeros({entries}, sums.options().dtype(dtype));
  out.narrow(0, 0, active).copy_(sums.narrow(0, 0, active));
  return out;
}

at::Tensor conv_through_aten(const at::Tensor& x, const at::Tensor& w, const MaybeTensor& bias, const ConvGeometry& g,
                             Activation activation, const MaybeTensor& residual, at::MemoryFormat format) {
  const int64_t n = g.transposed ? w.size(1) * g.groups : w.size(0);
  const MaybeTensor b = bias ? MaybeTensor(bias->narrow(0, 0, n)) : MaybeTensor();
  at::Tensor y = at::convolution(x, laid_out(w, format, g.transposed), b, g.stride, g.padding, g.dilation, g.transposed, g.output_padding, g.groups)
                     .contiguous(format);
  add_activate(y, residual, activation);
  return y;
}

ThreeTensors conv_backward_through_aten(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                                        const at::Tensor& w, int64_t full_bias, const ConvGeometry& g, bool need_dx,
                                        bool need_dw, bool need_db, GradientSize size) {
  auto [dx, dw, db] =
      at::convolution_backward(dy, x, laid_out(w, conv_format(x, weight), g.transposed), at::IntArrayRef{dy.size(1)}, g.stride, g.padding, g.dilation, g.transposed,
                               g.output_padding, g.groups, {need_dx, need_dw, need_db});
  dx = need_dx ? dx.contiguous(conv_format(x, weight)) : at::empty({0}, dy.options());
  dw = need_dw ? sized_gradient(dw, weight, size) : at::empty({0}, dy.options());
  db = need_db ? sized_bias_gradient(db, dy.size(1), full_bias, dy.scalar_type(), size) : at::empty({0}, dy.options());
  return {dx, dw, db};
}

}  // namespace slimkernels
