// Layer, RMS and group norm.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>
#include <pybind11/gil.h>
#include <torch/csrc/autograd/custom_function.h>

#include <limits>
#include <tuple>

#include "eager.h"

namespace slimkernels {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

enum class Norm { kLayer, kRms, kGroup };

struct NormCall : torch::CustomClassHolder {
  Norm norm;
  int64_t group_size = 0;
  double eps;
  bool has_weight, has_bias, has_residual;
  std::string activation;
};

using NormCallPtr = c10::intrusive_ptr<NormCall>;
using Text = c10::string_view;
using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // y, mean (undefined for RMS norm), invstd
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;  // dx, dw, db, dresidual

Result run(const at::Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& residual,
           const NormCall& c) {
  static const Kernel<Result(const at::Tensor&, const MaybeTensor&, const MaybeTensor&, double, Text,
                             const MaybeTensor&)>
      layer("slimkernels::slim_layer_norm");
  static const Kernel<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const MaybeTensor&, double, Text,
                                                         const MaybeTensor&)>
      rms("slimkernels::slim_rms_norm");
  static const Kernel<Result(const at::Tensor&, const MaybeTensor&, const MaybeTensor&, int64_t, double, Text,
                             const MaybeTensor&)>
      group("slimkernels::slim_group_norm");
  const at::AutoDispatchBelowADInplaceOrView below;
  if (c.norm == Norm::kLayer) return layer(x, weight, bias, c.eps, c.activation, residual);
  if (c.norm == Norm::kGroup) return group(x, weight, bias, c.group_size, c.eps, c.activation, residual);
  auto [y, invrms] = rms(x, weight, c.eps, c.activation, residual);
  return {y, at::Tensor(), invrms};
}

struct Saved {
  at::Tensor x, mean, invstd;
  MaybeTensor weight, bias, output, residual;
};

template <typename Call>
auto below_autograd(const Call& call) {
  const at::AutoDispatchBelowADInplaceOrView below;
  return call();
}

Gradients run_backward(const at::Tensor& dy, const Saved& s, const NormCall& c, bool need_dx, bool need_dw,
                       bool need_db, bool need_dresidual) {
  using T = const at::Tensor&;
  using M = const MaybeTensor&;
  static const Kernel<Gradients(T, T, T, T, M, M, M, M, Text, bool, bool, bool, bool)> layer(
      "slimkernels::slim_layer_norm_backward");
  static const Kernel<Result(T, T, T, M, M, M, Text, bool, bool, bool)> rms("slimkernels::slim_rms_norm_backward");
  static const Kernel<Gradients(T, T, T, T, M, M, M, M, int64_t, Text, bool, bool, bool, bool)> group(
      "slimkernels::slim_group_norm_backward");
  const auto call = [](const auto& kernel, const auto&... args) {
    if (at::GradMode::is_enabled()) return kernel.recorded(args...);
    return below_autograd([&] { return kernel(args...); });
  };
  const Text name = c.activation;
  if (c.norm == Norm::kLayer) {
    return call(layer, dy, s.x, s.mean, s.invstd, s.weight, s.bias, s.output, s.residual, name, need_dx, need_dw,
                need_db, need_dresidual);
  }
  if (c.norm == Norm::kGroup) {
    return call(group, dy, s.x, s.mean, s.invstd, s.weight, s.bias, s.output, s.residual, c.group_size, name, need_dx,
                need_dw, need_db, need_dresidual);
  }
  auto [dx, dw, dresidual] =
      call(rms, dy, s.x, s.invstd, s.weight, s.output, s.residual, name, need_dx, need_dw, need_dresidual);
  return {dx, dw, at::Tensor(), dresidual};
}

class EagerNorm : public torch::autograd::Function<EagerNorm> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const MaybeTensor& weight,
                            const MaybeTensor& bias, const MaybeTensor& residual, NormCallPtr call) {
    const auto [y, mean, invstd] = run(x, weight, bias, residual, *call);
    // Without a residual the activation's input comes from x.
    at::Tensor output, added;
    if (residual && call->activation != "none") {
      const bool by_output = derivative_uses_output(parse_activation("norm", call->activation));
      (by_output ? output : added) = by_output ? y : *residual;
    }
    ctx->save_for_backward(
        {x, mean, invstd, weight.value_or(at::Tensor()), bias.value_or(at::Tensor()), output, added});
    ctx->saved_data["call"] = c10::IValue::make_capsule(std::move(call));
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list found(5);
    if (!grads[0].defined()) return found;
    const auto call = c10::static_intrusive_pointer_cast<NormCall>(ctx->saved_data["call"].toCapsule());
    const variable_list kept = ctx->get_saved_variables();
    const Saved saved{kept[0], kept[1], kept[2], maybe(kept[3]), maybe(kept[4]), maybe(kept[5]), maybe(kept[6])};
    size_t next = 1;
    const auto needed = [&](bool given) { return given && ctx->needs_input_grad(next++); };
    const bool need_dx = ctx->needs_input_grad(0), need_dw = needed(call->has_weight), need_db = needed(call->has_bias);
    const bool need_dresidual = needed(call->has_residual), plain = call->activation == "none";
    auto [dx, dw, db, dresidual] =
        run_backward(grads[0], saved, *call, need_dx, need_dw, need_db, need_dresidual && !plain);
    if (need_dx) found[0] = dx;
    if (need_dw) found[1] = dw;
    if (need_db) found[2] = db;
    if (need_dresidual) found[3] = plain ? grads[0] : dresidual;
    return found;
  }
};

bool fits(const at::Tensor& x, int64_t channels, const MaybeTensor& parameter) {
  return !parameter || (parameter->dim() == 1 && parameter->size(0) >= channels &&
                        (parameter->scalar_type() == x.scalar_type() || parameter->scalar_type() == at::kFloat));
}

std::optional<at::Tensor> eager(Arguments& args, Norm norm, const char* op) {
  const at::Tensor x = args.tensor();
  const MaybeTensor weight = args.maybe_tensor(), bias = norm == Norm::kRms ? MaybeTensor() : args.maybe_tensor();
  auto call = c10::make_intrusive<NormCall>();
  call->norm = norm;
  if (norm == Norm::kGroup) call->group_size = args.integer();
  call->eps = args.number(std::numeric_limits<float>::epsilon());  // of RMS norm
  const std::string_view name = args.name();
  const MaybeTensor residual = args.maybe_tensor();
  if (!args.ok || !find_activation(name) || (norm == Norm::kGroup && (x.dim() < 2 || call->group_size < 1)) ||
      x.dim() < 1) {
    return std::nullopt;
  }
  const int64_t channels = x.size(norm == Norm::kGroup ? 1 : -1);
  if (!fits(x, channels, weight) || !fits(x, channels, bias)) return std::nullopt;
  if (residual && (residual->sizes() != x.sizes() || residual->scalar_type() != x.scalar_type())) return std::nullopt;
  call->activation = name;
  call->has_weight = weight.has_value();
  call->has_bias = bias.has_value();
  call->has_residual = residual.has_value();
  RECORD_FUNCTION(op, c10::ArrayRef<const c10::IValue>());
  const pybind11::gil_scoped_release released;
  if (is_recorded(x, weight, bias, residual)) return EagerNorm::apply(x, weight, bias, residual, std::move(call));
  return std::get<0>(run(x, weight, bias, residual, *call));
}

}  // namespace

std::optional<at::Tensor> eager_layer_norm(Arguments& args) {
  return eager(args, Norm::kLayer, "slimkernels::slim_layer_norm");
}
std::optional<at::Tensor> eager_rms_norm(Arguments& args) {
  return eager(args, Norm::kRms, "slimkernels::slim_rms_norm");
}
std::optional<at::Tensor> eager_group_norm(Arguments& args) {
  return eager(args, Norm::kGroup, "slimkernels::slim_group_norm");
}

}  // namespace slimkernels
