#include "slim_conv_norm.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>

#include "slim_batch_norm.h"

namespace slimkernels {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class ConvNorm;
using torch::autograd::CppNode;
using torch::autograd::Edge;

constexpr int kMostNorms = 2;  // that are run to have an output again: after a sum each needs the output before

// What backward needs beside the tensors that autograd keeps.
struct Kept : torch::CustomClassHolder {
  ConvNormOptions options;
  ConvNormSlots slots;
  at::Tensor mean, var;
  int64_t groups = 1;
  bool need_x = false, need_weight = false, need_norm_weight = false, need_norm_bias = false, need_residual = false;
  // With recomputed outputs: the nodes that give x and the residual again instead of their being kept, what this node's own
  // output costs (0: it is kept; -1: it cannot be had), and the output once it was computed, where several ask for it.
  Edge x_from, residual_from;
  int norms = -1;
  bool shared = false;
  at::Tensor again;
};

bool needs_gradient(const MaybeTensor& t) { return t && t->requires_grad(); }

// The active slice in the dtype of x; the weight itself where it has that dtype.
at::Tensor weight_in_dtype(const at::Tensor& weight, const at::Tensor& x, int64_t out_channels, int64_t groups) {
  if (weight.scalar_type() == x.scalar_type()) return weight;
  return weight.narrow(0, 0, out_channels).narrow(1, 0, x.size(1) / groups).to(x.scalar_type());
}

void update_running(const MaybeTensor& running, const at::Tensor& batch, double momentum, double factor) {
  if (!running) return;
  const at::Tensor active = running->narrow(0, 0, batch.size(0));
  if (active.scalar_type() != at::kFloat || !active.is_contiguous()) {
    active.lerp_(batch.mul(factor).to(active.scalar_type()), momentum);
    return;
  }
  float* to = active.data_ptr<float>();
  const float* from = batch.const_data_ptr<float>();
  const float share = static_cast<float>(momentum), scale = static_cast<float>(factor);
  for (int64_t c = 0; c < batch.size(0); ++c) to[c] += share * (from[c] * scale - to[c]);
  running->unsafeGetTensorImpl()->bump_version();
}

class ConvNorm : public torch::autograd::Function<ConvNorm> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight, const MaybeTensor& norm_weight,
                            const MaybeTensor& norm_bias, const MaybeTensor& residual, int64_t out_channels,
                            c10::intrusive_ptr<Kept> kept, const RunningStatistics& running) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const ConvNormOptions& o = kept->options;
    const at::Tensor used = weight_in_dtype(weight, x, out_channels, kept->groups);
    const at::Tensor between = slim_conv_cpu(x, used, std::nullopt, out_channels, o.stride, o.padding, o.dilation, kept->groups,
                                             "none", std::nullopt);
    const int64_t count = between.numel() / out_channels;
    TORCH_CHECK_VALUE(count > 1, "slim_batch_norm: expected more than 1 value per channel in training, got shape ",
                      between.sizes());
    at::Tensor y;
    std::tie(y, kept->mean, kept->var) = slim_batch_norm_cpu(between, std::nullopt, std::nullopt, norm_weight, norm_bias, true,
                                                             o.eps, o.activation, residual);
    update_running(running.mean, kept->mean, running.momentum, 1.0);
    update_running(running.var, kept->var, running.momentum, static_cast<double>(count) / static_cast<double>(count - 1));
    // Without a residual the activation's input comes from `between`.
    at::Tensor output, added;
    if (residual && !kept->residual_from.is_valid()) {
      const Activation activation = parse_activation("slim_batch_norm", o.activation);
      const bool uses_output = derivative_uses_output(activation);
      if (uses_output && (activation != Activation::kNone || kept->norms == 0)) output = y;
      if (!uses_output) added = *residual;
    }
    ctx->save_for_backward({kept->x_from.is_valid() ? at::Tensor() : x, used.is_same(weight) ? at::Tensor() : used, between,
                            norm_weight.value_or(at::Tensor()), norm_bias.value_or(at::Tensor()), output, added, weight});
    ctx->saved_data["kept"] = c10::IValue::make_capsule(std::move(kept));
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list found(8);
    if (!grads[0].defined()) return found;
    const at::NoGradGuard no_grad;
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto kept = c10::static_intrusive_pointer_cast<Kept>(ctx->saved_data["kept"].toCapsule());
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &between = saved[2], &weight = saved[7], &used = saved[1].defined() ? saved[1] : weight;
    const auto optional = [](const at::Tensor& t) { return t.defined() ? MaybeTensor(t) : MaybeTensor(); };
    const MaybeTensor norm_weight = optional(saved[3]), norm_bias = optional(saved[4]);
    const ConvNormOptions& o = kept->options;
    const bool plain = o.activation == "none";
    at::Tensor output = saved[5], added = saved[6];
    if (kept->residual_from.is_valid() && !plain) {
      if (derivative_uses_output(parse_activation("slim_batch_norm", o.activation))) {
        output = value(*kept, saved);
      } else {
        added = value_of(kept->residual_from);
      }
    }
    auto [dbetween, dnorm_weight, dnorm_bias, dresidual] = slim_batch_norm_backward_cpu<false>(
        grads[0], between, kept->mean, kept->var, norm_weight, norm_bias, optional(output), optional(added), true, o.eps,
        o.activation, kept->need_x || kept->need_weight, kept->need_norm_weight, kept->need_norm_bias,
        kept->need_residual && !plain);
    const auto deposit = [](const std::shared_ptr<GradientSlot>& slot, const at::Tensor& part, const at::Tensor& full) {
      if (slot) return slot->add(part);
      GradientSlot whole(full);
      whole.last = true;
      return whole.add(part);
    };
    if (kept->need_norm_weight) found[2] = deposit(kept->slots.norm_weight, dnorm_weight, *norm_weight);
    if (kept->need_norm_bias) found[3] = deposit(kept->slots.norm_bias, dnorm_bias, *norm_bias);
    if (kept->need_residual) found[4] = plain ? grads[0] : dresidual;
    kept->again.reset();  // every other use of the output is over
    output.reset();
    added.reset();
    if (kept->need_x || kept->need_weight) {
      const at::Tensor x = kept->x_from.is_valid() ? value_of(kept->x_from) : saved[0];
      auto [dx, dw, db] = slim_conv_backward_cpu<GradientSize::kSlice>(dbetween, x, used, o.stride, o.padding, o.dilation,
                                                                       kept->groups, kept->need_x, kept->need_weight, false);
      if (kept->need_x) found[0] = dx;
      if (kept->need_weight) found[1] = deposit(kept->slots.weight, dw, weight);
    }
    return found;
  }

  // The node that gives `t` again, if it is the output of one that can.
  static Edge source(const at::Tensor& t) {
    const auto& node = t.grad_fn();
    const auto* own = dynamic_cast<CppNode<ConvNorm>*>(node.get());
    if (!own || t._version() != 0) return {};
    return kept_of(*own)->norms < 0 ? Edge() : Edge(node, 0);
  }

  static c10::intrusive_ptr<Kept> kept_of(const CppNode<ConvNorm>& node) {
    return c10::static_intrusive_pointer_cast<Kept>(node.ctx_.saved_data.at("kept").toCapsule());
  }

  static c10::intrusive_ptr<Kept> kept_of(const Edge& edge) {
    return kept_of(*static_cast<CppNode<ConvNorm>*>(edge.function.get()));
  }

  // The output of a node whose backward has not run.
  static at::Tensor value_of(const Edge& edge) {
    const auto* node = static_cast<CppNode<ConvNorm>*>(edge.function.get());
    return value(*kept_of(*node), node->ctx_.get_saved_variables());
  }

  // The same loop on the same statistics: equal to the bit.
  static at::Tensor value(Kept& kept, const variable_list& saved) {
    if (saved[5].defined()) return saved[5];
    if (kept.again.defined()) return kept.again;
    const auto optional = [](const at::Tensor& t) { return t.defined() ? MaybeTensor(t) : MaybeTensor(); };
    const MaybeTensor residual = kept.residual_from.is_valid() ? MaybeTensor(value_of(kept.residual_from)) : std::nullopt;
    const at::Tensor y = std::get<0>(slim_batch_norm_cpu(saved[2], kept.mean, kept.var, optional(saved[3]), optional(saved[4]),
                                                         false, kept.options.eps, kept.options.activation, residual));
    if (residual || kept.shared) kept.again = y;
    return y;
  }
};

}  // namespace

std::optional<at::Tensor> slim_conv_norm(const at::Tensor& x, const at::Tensor& weight, const MaybeTensor& norm_weight,
                          const MaybeTensor& norm_bias, const MaybeTensor& residual, int64_t out_channels, int64_t groups,
                          const ConvNormOptions& options, const ConvNormSlots& slots, const RunningStatistics& running,
                          bool recompute) {
  const c10::DimVector zeros(options.stride.size(), 0);
  const ConvGeometry geometry{options.stride, options.padding, zeros, options.dilation, groups, false};
  const bool same_dtype = weight.scalar_type() == x.scalar_type();
  check_conv("slim_conv", x, same_dtype ? weight : at::empty(weight.sizes(), x.options().device(at::kMeta)), std::nullopt,
             out_channels, geometry);
  if (residual && residual->sizes() != at::IntArrayRef(conv_output_sizes(x, weight, out_channels, geometry))) return std::nullopt;
  auto kept = c10::make_intrusive<Kept>();
  kept->options = options;
  kept->slots = slots;
  kept->groups = groups;
  kept->need_x = x.requires_grad();
  kept->need_weight = weight.requires_grad();
  kept->need_norm_weight = needs_gradient(norm_weight);
  kept->need_norm_bias = needs_gradient(norm_bias);
  kept->need_residual = needs_gradient(residual);
  if (recompute) {
    kept->x_from = ConvNorm::source(x);
    const Edge before = residual ? ConvNorm::source(*residual) : Edge();
    if (!residual) {
      kept->norms = 1;
    } else if (before.is_valid() && ConvNorm::kept_of(before)->norms < kMostNorms) {
      kept->norms = ConvNorm::kept_of(before)->norms + 1;
      ConvNorm::kept_of(before)->shared = true;
      kept->residual_from = before;
    } else if (derivative_uses_output(parse_activation("slim_batch_norm", options.activation))) {
      kept->norms = 0;
    }
  }
  return ConvNorm::apply(x, weight, norm_weight, norm_bias, residual, out_channels, std::move(kept), running);
}

}  // namespace slimkernels
