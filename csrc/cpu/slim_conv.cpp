#include "slim_conv.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "reference_call.h"
#include "slim_conv_depthwise.h"
#include "slim_conv_direct.h"
#include "slim_conv_pointwise.h"

namespace slimkernels {
namespace {

constexpr int64_t kLittlePointwiseWork = 20'000'000;

// In bfloat16 oneDNN takes .8 of the time of our 1x1 kernels where there is enough to do for its way there.
bool runs_pointwise(const at::Tensor& x, const at::Tensor& weight, int64_t out_channels, const ConvGeometry& geometry) {
  return is_pointwise(x, weight, geometry) &&
         (x.scalar_type() != at::kBFloat16 || x.numel() * out_channels <= kLittlePointwiseWork);
}

}  // namespace

at::Tensor slim_conv_cpu(const at::Tensor& x, const at::Tensor& weight, const MaybeTensor& bias, int64_t out_channels,
                         at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                         c10::string_view activation_name, const MaybeTensor& residual) {
  const c10::DimVector zeros(stride.size(), 0);
  const ConvGeometry geometry{stride, padding, zeros, dilation, groups, false};
  check_conv("slim_conv", x, weight, bias, out_channels, geometry);
  const Activation activation = parse_activation("slim_conv", activation_name);
  if (!conv_takes(x)) {
    return call_reference<decltype(slim_conv_cpu)>("slimkernels::slim_conv", x, weight, bias, out_channels, stride,
                                                   padding, dilation, groups, activation_name, residual);
  }
  if (runs_pointwise(x, weight, out_channels, geometry)) {
    return pointwise_conv(x, weight, bias, out_channels, activation, residual);
  }
  if (auto y = direct_conv(x, weight, bias, out_channels, geometry, activation, residual)) return *y;
  const at::Tensor w = weight.narrow(0, 0, out_channels).narrow(1, 0, x.size(1) / groups);
  return conv_through_aten(x, w, bias, geometry, activation, residual, conv_format(x, weight));
}

template <GradientSize size>
ThreeTensors slim_conv_backward_cpu(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                                    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                    int64_t groups, bool need_dx, bool need_dw, bool need_db) {
  constexpr const char* name =
      size == GradientSize::kSlice ? "slimkernels::slim_conv_backward_slice" : "slimkernels::slim_conv_backward";
  const c10::DimVector zeros(stride.size(), 0);
  const ConvGeometry geometry{stride, padding, zeros, dilation, groups, false};
  TORCH_CHECK_VALUE(dy.dim() == x.dim(), "slim_conv_backward: expected dy to have ", x.dim(), " dimensions, got shape ",
                    dy.sizes());
  check_conv("slim_conv_backward", x, weight, std::nullopt, dy.size(1), geometry);
  const c10::DimVector sizes = conv_output_sizes(x, weight, dy.size(1), geometry);
  TORCH_CHECK_VALUE(dy.sizes() == at::IntArrayRef(sizes), "slim_conv_backward: expected dy of shape ",
                    at::IntArrayRef(sizes), ", got ", dy.sizes());
  if (!conv_takes(x) || dy.scalar_type() != x.scalar_type()) {
    return call_reference<decltype(slim_conv_backward_cpu<size>), static_cast<int>(size)>(
        name, dy, x, weight, stride, padding, dilation, groups, need_dx, need_dw, need_db);
  }
  at::Tensor dx, dw, db;
  const bool pointwise = runs_pointwise(x, weight, dy.size(1), geometry);
  if (need_dx && pointwise) dx = pointwise_input_gradient(dy, x, weight);
  if (need_dx && !dx.defined()) dx = depthwise_conv_input_gradient(dy, x, weight, geometry);
  if (need_dx && !dx.defined()) dx = direct_conv_input_gradient(dy, x, weight, geometry);
  if (pointwise) {
    if (need_dw) dw = pointwise_weight_gradient(dy, x, weight, size);
    if (need_db) {
      db = sized_bias_gradient(channel_sums(dy), dy.size(1), weight.size(0), dy.scalar_type(), size);
    }
  } else if (need_dw || need_db) {
    std::tie(dw, db) = depthwise_conv_weight_gradient(dy, x, weight, geometry, need_dw, size);
    if (!db.defined()) std::tie(dw, db) = direct_conv_weight_gradient(dy, x, weight, geometry, need_dw, size);
    // Winograd's sums have none of the bias, and asked for that alone oneDNN works out the weight's gradient again.
    if (need_db && dw.defined() && !db.defined()) {
      db = sized_bias_gradient(channel_sums(dy), dy.size(1), weight.size(0), dy.scalar_type(), size);
    }
  }
  const bool rest_dx = need_dx && !dx.defined(), rest_dw = need_dw && !dw.defined(), rest_db = need_db && !db.defined();
  if (rest_dx || rest_dw || rest_db) {
    const at::Tensor w = weight.narrow(0, 0, dy.size(1)).narrow(1, 0, x.size(1) / groups);
    auto [rx, rw, rb] =
        conv_backward_through_aten(dy, x, weight, w, weight.size(0), geometry, rest_dx, rest_dw, rest_db, size);
    if (rest_dx) dx = rx;
    if (rest_dw) dw = rw;
    if (rest_db) db = rb;
  }
  const auto nothing = [&] { return at::empty({0}, dy.options()); };
  return {need_dx ? dx : nothing(), need_dw ? dw : nothing(), need_db ? db : nothing()};
}

TORCH_LIBRARY_IMPL(slimkernels, CPU, m) {
  m.impl("slim_conv", &slim_conv_cpu);
  m.impl("slim_conv_backward", &slim_conv_backward_cpu<GradientSize::kFull>);
  m.impl("slim_conv_backward_slice", &slim_conv_backward_cpu<GradientSize::kSlice>);
}

}  // namespace slimkernels
