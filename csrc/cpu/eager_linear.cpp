#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>
#include <pybind11/gil.h>

#include <tuple>

#include "eager_product.h"

namespace slimkernels {
namespace {

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

struct LinearCall : ProductCall {
  int64_t out_features, in_blocks, out_blocks;
};

at::Tensor run(const at::Tensor& x, const at::Tensor& weight, const MaybeTensor& bias, const MaybeTensor& residual,
               const LinearCall& c) {
  static const Kernel<at::Tensor(const at::Tensor&, const at::Tensor&, const MaybeTensor&, int64_t, int64_t, int64_t,
                                 c10::string_view, const MaybeTensor&)>
      kernel("slimkernels::slim_linear");
  const at::AutoDispatchBelowADInplaceOrView below;
  return kernel(x, weight, bias, c.out_features, c.in_blocks, c.out_blocks, c.activation, residual);
}

Gradients run_backward(const at::Tensor& dz, const at::Tensor& x, const at::Tensor& weight, const LinearCall& c,
                       bool need_dx, bool need_dw, bool need_db) {
  static const Kernel<Gradients(const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, int64_t, bool, bool,
                                bool)>
      kernel("slimkernels::slim_linear_backward");
  RECORD_FUNCTION("slimkernels::slim_linear_backward", c10::ArrayRef<const c10::IValue>());
  if (at::GradMode::is_enabled())
    return kernel.recorded(dz, x, weight, c.in_blocks, c.out_blocks, need_dx, need_dw, need_db);
  const at::AutoDispatchBelowADInplaceOrView below;
  return kernel(dz, x, weight, c.in_blocks, c.out_blocks, need_dx, need_dw, need_db);
}

bool is_blocks(int64_t active, int64_t full, int64_t blocks) {
  return blocks >= 1 && full % blocks == 0 && active >= 1 && active <= full && active % blocks == 0;
}

bool fits(const at::Tensor& x, const at::Tensor& weight, const MaybeTensor& bias, const MaybeTensor& residual,
          const LinearCall& c) {
  const auto dtype = x.scalar_type();
  if (!is_blocks(c.out_features, weight.size(0), c.out_blocks) || !is_blocks(x.size(-1), weight.size(1), c.in_blocks))
    return false;
  if (weight.scalar_type() != dtype) return false;
  if (bias && (bias->scalar_type() != dtype || bias->dim() != 1 || bias->size(0) != weight.size(0))) return false;
  return !residual ||
         (residual->scalar_type() == dtype && residual->dim() == x.dim() && residual->size(-1) == c.out_features &&
          residual->sizes().slice(0, x.dim() - 1) == x.sizes().slice(0, x.dim() - 1));
}

}  // namespace

std::optional<at::Tensor> eager_linear(Arguments& args) {
  const at::Tensor x = args.tensor(), weight = args.tensor();
  const MaybeTensor bias = args.maybe_tensor();
  if (!args.ok || weight.dim() != 2 || x.dim() < 1) return std::nullopt;
  auto call = c10::make_intrusive<LinearCall>();
  call->out_features = args.maybe_integer().value_or(weight.size(0));
  call->in_blocks = args.integer();
  call->out_blocks = args.integer();
  const std::string_view name = args.name();
  const MaybeTensor residual = args.maybe_tensor();
  const std::optional<Activation> activation = find_activation(name);
  if (!args.ok || !activation || !fits(x, weight, bias, residual, *call)) return std::nullopt;
  call->activation = name;
  call->has_bias = bias.has_value();
  call->has_residual = residual.has_value();
  const bool recorded = is_recorded(x, weight, bias, residual);
  if (recorded && !derivative_uses_output(*activation)) return std::nullopt;  // the public function keeps the input
  RECORD_FUNCTION("slimkernels::slim_linear", c10::ArrayRef<const c10::IValue>());
  const pybind11::gil_scoped_release released;
  return recorded ? EagerProduct<LinearCall>::apply(x, weight, bias, residual, std::move(call))
                  : run(x, weight, bias, residual, *call);
}

}  // namespace slimkernels
