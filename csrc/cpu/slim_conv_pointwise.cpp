#include "slim_conv_pointwise.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <memory>

#include "gemm.h"

#define SK_INL "slim_conv_pointwise-inl.h"
#include "foreach_isa.h"

namespace slimkernels {
namespace {

// The distance of neighbouring pixels, -1 where they do not lie in one row of such steps.
int64_t pixel_stride(const at::Tensor& t) {
  if (t.size(1) > 1 && t.stride(1) != 1) return -1;
  int64_t step = -1, next = 1;
  for (const int64_t d : {3, 2, 0}) {
    if (t.size(d) == 1) continue;
    if (step < 0) step = t.stride(d) / next;
    if (t.stride(d) != step * next) return -1;
    next *= t.size(d);
  }
  return step < 0 ? t.size(1) : step >= t.size(1) ? step : -1;
}

at::Tensor with_pixels(const at::Tensor& t) {
  return pixel_stride(t) < 0 ? t.contiguous(at::MemoryFormat::ChannelsLast) : t;
}

template <typename T>
Matrix<T> pixels_of(const at::Tensor& t) {
  return {t.const_data_ptr<T>(), pixel_stride(t), 1};
}

template <typename T>
Matrix<T> filters_of(const at::Tensor& weight) {
  return {weight.const_data_ptr<T>(), weight.stride(0), weight.stride(1)};
}

// One of the strides is 1 and the other at least as long as what lies side by side.
bool has_rows(const at::Tensor& weight) {
  return (weight.stride(1) == 1 && weight.stride(0) >= weight.size(1)) ||
         (weight.stride(0) == 1 && weight.stride(1) >= weight.size(0));
}

template <typename T, typename Call>
void with_multiplied_type(Call call) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    if (gemm_takes_bf16()) return call(c10::BFloat16());
  }
  call(float());
}

int64_t count_of(const at::Tensor& t) { return t.size(0) * t.size(2) * t.size(3); }

}  // namespace

bool is_pointwise(const at::Tensor& x, const at::Tensor& weight, const ConvGeometry& g) {
  const auto all = [](at::IntArrayRef values, int64_t wanted) {
    return std::all_of(values.begin(), values.end(), [wanted](int64_t v) { return v == wanted; });
  };
  return current_isa() == Isa::kAvx512 && x.dim() == 4 && x.numel() > 0 && g.groups == 1 && !g.transposed &&
         all(weight.sizes().slice(2), 1) && all(g.stride, 1) && all(g.padding, 0) && has_rows(weight) &&
         conv_format(x, weight) == at::MemoryFormat::ChannelsLast;
}

at::Tensor pointwise_conv(const at::Tensor& x, const at::Tensor& weight, const MaybeTensor& bias, int64_t out_channels,
                          Activation activation, const MaybeTensor& residual) {
  const at::Tensor in = with_pixels(x);
  at::Tensor y = at::empty({x.size(0), out_channels, x.size(2), x.size(3)},
                           x.options().memory_format(at::MemoryFormat::ChannelsLast));
  const at::Tensor b = bias ? bias->narrow(0, 0, out_channels).to(at::kFloat).contiguous() : at::Tensor();
  AT_DISPATCH_SWITCH(x.scalar_type(), "slim_conv", SK_CASES_F32_BF16_F16([&] {
                       with_multiplied_type<scalar_t>([&]<typename C>(C) {
                         SK_CALL_ISA(pointwise_kernel<C>, pixels_of<scalar_t>(in), count_of(x), x.size(1),
                                     filters_of<scalar_t>(weight).transposed(), out_channels,
                                     bias ? b.const_data_ptr<float>() : nullptr, y.data_ptr<scalar_t>());
                       });
                     }));
  add_activate(y, residual, activation);
  return y;
}

at::Tensor pointwise_input_gradient(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight) {
  const at::Tensor grad = with_pixels(dy);
  at::Tensor dx = at::empty(x.sizes(), x.options().memory_format(at::MemoryFormat::ChannelsLast));
  AT_DISPATCH_SWITCH(x.scalar_type(), "slim_conv_backward", SK_CASES_F32_BF16_F16([&] {
                       with_multiplied_type<scalar_t>([&]<typename C>(C) {
                         SK_CALL_ISA(pointwise_kernel<C>, pixels_of<scalar_t>(grad), count_of(dy), dy.size(1),
                                     filters_of<scalar_t>(weight), x.size(1), static_cast<const float*>(nullptr),
                                     dx.data_ptr<scalar_t>());
                       });
                     }));
  return dx;
}

at::Tensor pointwise_weight_gradient(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                                     GradientSize size) {
  const at::Tensor grad = with_pixels(dy), in = with_pixels(x);
  const bool whole = dy.size(1) == weight.size(0) && x.size(1) == weight.size(1);
  const bool same_strides =
      whole && weight.stride(1) == 1 && weight.stride(0) == x.size(1);  // its slot takes it as it is
  at::Tensor part = same_strides ? at::empty_like(weight) : at::empty({dy.size(1), x.size(1), 1, 1}, x.options());
  AT_DISPATCH_SWITCH(x.scalar_type(), "slim_conv_backward", SK_CASES_F32_BF16_F16([&] {
                       with_multiplied_type<scalar_t>([&]<typename C>(C) {
                         SK_CALL_ISA(pointwise_gradient_kernel<C>, pixels_of<scalar_t>(grad), dy.size(1),
                                     pixels_of<scalar_t>(in), x.size(1), count_of(dy), part.data_ptr<scalar_t>());
                       });
                     }));
  return same_strides ? part : sized_gradient(part, weight, size);
}

}  // namespace slimkernels
