#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>
#include <pybind11/gil.h>

#include "eager_product.h"
#include "slim_conv.h"

namespace slimkernels {
namespace {

using Numbers = at::IntArrayRef;

struct ConvCall : ProductCall {
  c10::DimVector stride, padding, output_padding, dilation;
  int64_t out_channels, groups, full_bias;  // full_bias: 0 without one
  bool transposed;
};

at::Tensor run(const at::Tensor& x, const at::Tensor& weight, const MaybeTensor& bias, const MaybeTensor& residual,
               const ConvCall& c) {
  static const Kernel<at::Tensor(const at::Tensor&, const at::Tensor&, const MaybeTensor&, int64_t, Numbers, Numbers,
                                 Numbers, int64_t, c10::string_view, const MaybeTensor&)>
      conv("slimkernels::slim_conv");
  static const Kernel<at::Tensor(const at::Tensor&, const at::Tensor&, const MaybeTensor&, int64_t, Numbers, Numbers,
                                 Numbers, Numbers, int64_t, c10::string_view, const MaybeTensor&)>
      transposed("slimkernels::slim_conv_transpose");
  const at::AutoDispatchBelowADInplaceOrView below;
  return c.transposed
             ? transposed(x, weight, bias, c.out_channels, c.stride, c.padding, c.output_padding, c.dilation, c.groups,
                          c.activation, residual)
             : conv(x, weight, bias, c.out_channels, c.stride, c.padding, c.dilation, c.groups, c.activation, residual);
}

ThreeTensors run_backward(const at::Tensor& dz, const at::Tensor& x, const at::Tensor& weight, const ConvCall& c,
                          bool need_dx, bool need_dw, bool need_db) {
  static const Kernel<ThreeTensors(const at::Tensor&, const at::Tensor&, const at::Tensor&, Numbers, Numbers, Numbers,
                                   int64_t, bool, bool, bool)>
      conv("slimkernels::slim_conv_backward");
  static const Kernel<ThreeTensors(const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, Numbers, Numbers,
                                   Numbers, Numbers, int64_t, bool, bool, bool)>
      transposed("slimkernels::slim_conv_transpose_backward");
  const auto call = [&](const auto& kernel, const auto&... args) {
    if (at::GradMode::is_enabled()) return kernel.recorded(args...);
    const at::AutoDispatchBelowADInplaceOrView below;
    return kernel(args...);
  };
  return c.transposed ? call(transposed, dz, x, weight, c.full_bias, Numbers(c.stride), Numbers(c.padding),
                             Numbers(c.output_padding), Numbers(c.dilation), c.groups, need_dx, need_dw, need_db)
                      : call(conv, dz, x, weight, Numbers(c.stride), Numbers(c.padding), Numbers(c.dilation), c.groups,
                             need_dx, need_dw, need_db);
}

// Whether everything has the sizes and dtypes that the public function asks for.
bool fits(const at::Tensor& x, const at::Tensor& weight, const MaybeTensor& bias, const MaybeTensor& residual,
          const ConvCall& c) {
  const int64_t channels = x.size(1), n = c.out_channels, groups = c.groups;
  if (groups < 1 || channels % groups != 0 || n % groups != 0) return false;
  if (c.transposed ? channels > weight.size(0) : channels / groups > weight.size(1)) return false;
  const int64_t most = c.transposed ? weight.size(1) * groups : weight.size(0);
  if (n < 1 || n > most) return false;
  if (bias && (bias->dim() != 1 || (c.transposed ? bias->size(0) < n : bias->size(0) != weight.size(0)))) return false;
  if (weight.scalar_type() != x.scalar_type() || (bias && bias->scalar_type() != x.scalar_type())) return false;
  if (residual && (residual->dim() != x.dim() || residual->scalar_type() != x.scalar_type() ||
                   residual->size(0) != x.size(0) || residual->size(1) != n)) {
    return false;
  }
  for (int64_t d = 0; d < x.dim() - 2; ++d) {
    const int64_t reach = c.dilation[d] * (weight.size(d + 2) - 1), size = x.size(d + 2), pads = 2 * c.padding[d];
    int64_t to = 0;
    if (c.transposed) {
      if (c.output_padding[d] >= std::max(c.stride[d], c.dilation[d])) return false;
      to = (size - 1) * c.stride[d] - pads + reach + c.output_padding[d] + 1;
    } else {
      to = size + pads - reach < 1 ? 0 : (size + pads - reach - 1) / c.stride[d] + 1;
    }
    if (to < 1 || (residual && residual->size(d + 2) != to)) return false;
  }
  return true;
}

std::optional<at::Tensor> eager(Arguments& args, bool transposed) {
  const at::Tensor x = args.tensor(), weight = args.tensor();
  const MaybeTensor bias = args.maybe_tensor();
  if (!args.ok || weight.dim() < 3 || weight.dim() > 5 || x.dim() != weight.dim()) return std::nullopt;
  const int64_t spatial = weight.dim() - 2;
  auto call = c10::make_intrusive<ConvCall>();
  call->transposed = transposed;
  const std::optional<int64_t> out_channels = args.maybe_integer();
  call->stride = args.integers(spatial, 1);
  call->padding = args.integers(spatial, 0);
  if (transposed) call->output_padding = args.integers(spatial, 0);
  call->dilation = args.integers(spatial, 1);
  call->groups = args.integer();
  const std::string_view name = args.name();
  const MaybeTensor residual = args.maybe_tensor();
  if (!args.ok) return std::nullopt;
  call->out_channels = out_channels.value_or(transposed ? weight.size(1) * call->groups : weight.size(0));
  call->has_bias = bias.has_value();
  call->full_bias = bias ? bias->size(0) : 0;
  call->has_residual = residual.has_value();
  const std::optional<Activation> activation = find_activation(name);
  if (!activation || !fits(x, weight, bias, residual, *call)) return std::nullopt;
  call->activation = name;
  const bool recorded = is_recorded(x, weight, bias, residual);
  if (recorded && !derivative_uses_output(*activation)) return std::nullopt;
  RECORD_FUNCTION(transposed ? "slimkernels::slim_conv_transpose" : "slimkernels::slim_conv",
                  c10::ArrayRef<const c10::IValue>());
  const pybind11::gil_scoped_release released;
  return recorded ? EagerProduct<ConvCall>::apply(x, weight, bias, residual, std::move(call))
                  : run(x, weight, bias, residual, *call);
}

}  // namespace

std::optional<at::Tensor> eager_conv(Arguments& args) { return eager(args, false); }
std::optional<at::Tensor> eager_conv_transpose(Arguments& args) { return eager(args, true); }

}  // namespace slimkernels
