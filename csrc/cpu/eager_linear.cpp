#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>
#include <pybind11/gil.h>
#include <torch/csrc/autograd/custom_function.h>

#include <tuple>

#include "eager.h"

namespace slimkernels {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

struct LinearCall : torch::CustomClassHolder {
  int64_t out_features, in_blocks, out_blocks;
  bool has_bias, has_residual;
  std::string activation;
};

using LinearCallPtr = c10::intrusive_ptr<LinearCall>;

at::Tensor run(const at::Tensor& x, const at::Tensor& weight, const MaybeTensor& bias, const MaybeTensor& residual, const LinearCall& c) {
  static const Kernel<at::Tensor(const at::Tensor&, const at::Tensor&, const MaybeTensor&, int64_t, int64_t, int64_t, c10::string_view,
                                 const MaybeTensor&)>
      kernel("slimkernels::slim_linear");
  const at::AutoDispatchBelowADInplaceOrView below;
  return kernel(x, weight, bias, c.out_features, c.in_blocks, c.out_blocks, c.activation, residual);
}

Gradients run_backward(const at::Tensor& dz, const at::Tensor& x, const at::Tensor& weight, const LinearCall& c, bool need_dx,
                       bool need_dw, bool need_db) {
  static const Kernel<Gradients(const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, int64_t, bool, bool, bool)> kernel(
      "slimkernels::slim_linear_backward");
  RECORD_FUNCTION("slimkernels::slim_linear_backward", c10::ArrayRef<const c10::IValue>());
  if (at::GradMode::is_enabled()) return kernel.recorded(dz, x, weight, c.in_blocks, c.out_blocks, need_dx, need_dw, need_db);
  const at::AutoDispatchBelowADInplaceOrView below;
  return kernel(dz, x, weight, c.in_blocks, c.out_blocks, need_dx, need_dw, need_db);
}

class EagerLinear : public torch::autograd::Function<EagerLinear> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight, const MaybeTensor& bias,
                            const MaybeTensor& residual, LinearCallPtr call) {
    const at::Tensor y = run(x, weight, bias, residual, *call);
    ctx->save_for_backward({x, weight, call->activation == "none" ? at::Tensor() : y});
    ctx->saved_data["call"] = c10::IValue::make_capsule(std::move(call));
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list found(5);
    if (!grads[0].defined()) return found;
    const auto call = c10::static_intrusive_pointer_cast<LinearCall>(ctx->saved_data["call"].toCapsule());
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor dz = activation_gradient(grads[0], saved[2], parse_activation("slim_linear", call->activation), call->activation);
    const bool need_dx = ctx->needs_input_grad(0), need_dw = ctx->needs_input_grad(1);
    const bool need_db = call->has_bias && ctx->needs_input_grad(2);
    if (need_dx || need_dw || need_db) {
      auto [dx, dw, db] = run_backward(dz, saved[0], saved[1], *call, need_dx, need_dw, need_db);
      if (need_dx) found[0] = dx;
      if (need_dw) found[1] = dw;
      if (need_db) found[2] = db;
    }
    if (call->has_residual && ctx->needs_input_grad(call->has_bias ? 3 : 2)) found[3] = dz;
    return found;
  }
};

bool is_blocks(int64_t active, int64_t full, int64_t blocks) {
  return blocks >= 1 && full % blocks == 0 && active >= 1 && active <= full && active % blocks == 0;
}

bool fits(const at::Tensor& x, const at::Tensor& weight, const MaybeTensor& bias, const MaybeTensor& residual, const LinearCall& c) {
  const auto dtype = x.scalar_type();
  if (!is_blocks(c.out_features, weight.size(0), c.out_blocks) || !is_blocks(x.size(-1), weight.size(1), c.in_blocks)) return false;
  if (weight.scalar_type() != dtype) return false;
  if (bias && (bias->scalar_type() != dtype || bias->dim() != 1 || bias->size(0) != weight.size(0))) return false;
  return !residual || (residual->scalar_type() == dtype && residual->dim() == x.dim() && residual->size(-1) == c.out_features &&
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
  return recorded ? EagerLinear::apply(x, weight, bias, residual, std::move(call)) : run(x, weight, bias, residual, *call);
}

}  // namespace slimkernels
