// The node of autograd of a linear layer or a convolution called from Python: products of x and weight, with bias,
// residual and an activation whose derivative comes from its output.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include <string>
#include <utility>

#include "eager.h"

namespace slimkernels {

struct ProductCall : torch::CustomClassHolder {
  bool has_bias, has_residual;
  std::string activation;
};

// `Call` is a ProductCall with the op's own arguments. Found by it: run(x, weight, bias, residual, call), the output,
// and run_backward(dz, x, weight, call, need_dx, need_dw, need_db), the three gradients.
template <typename Call>
class EagerProduct : public torch::autograd::Function<EagerProduct<Call>> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                            const MaybeTensor& bias, const MaybeTensor& residual, c10::intrusive_ptr<Call> call) {
    const at::Tensor y = run(x, weight, bias, residual, *call);
    ctx->save_for_backward({x, weight, call->activation == "none" ? at::Tensor() : y});
    ctx->saved_data["call"] = c10::IValue::make_capsule(std::move(call));
    return y;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    torch::autograd::variable_list found(5);
    if (!grads[0].defined()) return found;
    const auto call = c10::static_intrusive_pointer_cast<Call>(ctx->saved_data["call"].toCapsule());
    const torch::autograd::variable_list saved = ctx->get_saved_variables();
    const at::Tensor dz = activation_gradient(grads[0], saved[2], *find_activation(call->activation), call->activation);
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

}  // namespace slimkernels
