#include "eager_batch_norm.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>
#include <pybind11/gil.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cmath>
#include <limits>
#include <tuple>

namespace slimkernels {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct BatchNormCall : torch::CustomClassHolder {
  bool training, has_weight, has_bias, has_residual;
  double eps;
  std::string activation;
  at::Tensor mean, var;  // that normalised
};

using BatchNormCallPtr = c10::intrusive_ptr<BatchNormCall>;
using Text = c10::string_view;
using T = const at::Tensor&;
using M = const MaybeTensor&;
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;  // dx, dw, db, dresidual

// The output; the statistics go to the call. mean and var are given unless it is training.
at::Tensor run(T x, M mean, M var, M weight, M bias, M residual, BatchNormCall& c) {
  static const Kernel<std::tuple<at::Tensor, at::Tensor, at::Tensor>(T, M, M, M, M, bool, double, Text, M)> kernel(
      "slimkernels::slim_batch_norm");
  const at::AutoDispatchBelowADInplaceOrView below;
  at::Tensor y;
  std::tie(y, c.mean, c.var) = kernel(x, mean, var, weight, bias, c.training, c.eps, c.activation, residual);
  return y;
}

Gradients run_backward(T dy, T x, M weight, M bias, M output, M residual, const BatchNormCall& c, bool need_dx,
                       bool need_dw, bool need_db, bool need_dresidual) {
  static const Kernel<Gradients(T, T, T, T, M, M, M, M, bool, double, Text, bool, bool, bool, bool)> kernel(
      "slimkernels::slim_batch_norm_backward");
  if (at::GradMode::is_enabled()) {
    return kernel.recorded(dy, x, c.mean, c.var, weight, bias, output, residual, c.training, c.eps, c.activation,
                           need_dx, need_dw, need_db, need_dresidual);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return kernel(dy, x, c.mean, c.var, weight, bias, output, residual, c.training, c.eps, c.activation, need_dx, need_dw,
                need_db, need_dresidual);
}

class EagerBatchNorm : public torch::autograd::Function<EagerBatchNorm> {
 public:
  static at::Tensor forward(AutogradContext* ctx, T x, M mean, M var, M weight, M bias, M residual,
                            BatchNormCallPtr call) {
    const at::Tensor y = run(x, mean, var, weight, bias, residual, *call);
    // Without a residual the activation's input comes from x.
    at::Tensor output, added;
    if (residual && call->activation != "none") {
      const bool by_output = derivative_uses_output(parse_activation("slim_batch_norm", call->activation));
      (by_output ? output : added) = by_output ? y : *residual;
    }
    ctx->save_for_backward({x, weight.value_or(at::Tensor()), bias.value_or(at::Tensor()), output, added});
    ctx->saved_data["call"] = c10::IValue::make_capsule(std::move(call));
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list found(7);
    if (!grads[0].defined()) return found;
    const auto call = c10::static_intrusive_pointer_cast<BatchNormCall>(ctx->saved_data["call"].toCapsule());
    const variable_list kept = ctx->get_saved_variables();
    size_t next = call->training ? 1 : 3;
    const auto needed = [&](bool given) { return given && ctx->needs_input_grad(next++); };
    const bool need_dx = ctx->needs_input_grad(0), need_dw = needed(call->has_weight), need_db = needed(call->has_bias);
    const bool need_dresidual = needed(call->has_residual), plain = call->activation == "none";
    auto [dx, dw, db, dresidual] =
        run_backward(grads[0], kept[0], maybe(kept[1]), maybe(kept[2]), maybe(kept[3]), maybe(kept[4]), *call, need_dx,
                     need_dw, need_db, need_dresidual && !plain);
    if (need_dx) found[0] = dx;
    if (need_dw) found[3] = dw;
    if (need_db) found[4] = db;
    if (need_dresidual) found[5] = plain ? grads[0] : dresidual;
    return found;
  }
};

bool fits(T x, M parameter) {
  return !parameter || (parameter->dim() == 1 && parameter->size(0) >= x.size(1) &&
                        (parameter->scalar_type() == x.scalar_type() || parameter->scalar_type() == at::kFloat));
}

// Statistics that the loop below updates.
bool is_plain(M running) {
  return !running || (running->scalar_type() == at::kFloat && running->is_contiguous() && !running->requires_grad() &&
                      !running->is_inference());
}

void update(M running, T batch, double momentum, double factor) {
  if (!running) return;
  float* to = running->data_ptr<float>();
  const float* from = batch.const_data_ptr<float>();
  const float share = static_cast<float>(momentum), scale = static_cast<float>(factor);
  for (int64_t c = 0; c < batch.size(0); ++c) to[c] += share * (from[c] * scale - to[c]);
  running->unsafeGetTensorImpl()->bump_version();
}

}  // namespace

std::optional<at::Tensor> eager_batch_norm(Arguments& args) {
  const at::Tensor x = args.tensor();
  const MaybeTensor mean = args.maybe_tensor(), var = args.maybe_tensor(), weight = args.maybe_tensor(),
                    bias = args.maybe_tensor();
  auto call = c10::make_intrusive<BatchNormCall>();
  const double momentum = args.number(std::numeric_limits<double>::quiet_NaN());  // None: on given statistics
  call->training = !std::isnan(momentum);
  call->eps = args.number(0.0);
  const std::string_view name = args.name();
  const MaybeTensor residual = args.maybe_tensor();
  if (!args.ok || x.dim() < 2 || mean.has_value() != var.has_value() || !(mean || call->training) ||
      !find_activation(name)) {
    return std::nullopt;
  }
  if (!fits(x, weight) || !fits(x, bias) || !fits(x, mean) || !fits(x, var) || !is_plain(mean) || !is_plain(var))
    return std::nullopt;
  if (residual && (residual->sizes() != x.sizes() || residual->scalar_type() != x.scalar_type())) return std::nullopt;
  const double count = static_cast<double>(x.numel() / x.size(1));
  if (call->training && count < 2) return std::nullopt;
  call->activation = name;
  call->has_weight = weight.has_value();
  call->has_bias = bias.has_value();
  call->has_residual = residual.has_value();
  const auto given = [&](M running) { return call->training ? MaybeTensor() : running; };
  RECORD_FUNCTION("slimkernels::slim_batch_norm", c10::ArrayRef<const c10::IValue>());
  const pybind11::gil_scoped_release released;
  const at::Tensor y = is_recorded(x, weight, bias, residual)
                           ? EagerBatchNorm::apply(x, given(mean), given(var), weight, bias, residual, call)
                           : run(x, given(mean), given(var), weight, bias, residual, *call);
  if (call->training) {
    update(mean, call->mean, momentum, 1.0);
    update(var, call->var, momentum, count / (count - 1));
  }
  return y;
}

}  // namespace slimkernels
