// The sum of one parameter's gradients over the passes of a training step: slimkernels/ops/_slots.py says what it is for.
#pragma once

#include <ATen/core/Tensor.h>

namespace slimkernels {

struct GradientSlot {
  at::Tensor parameter;
  at::Tensor leaf;   // what ops run on before the last pass
  at::Tensor total;  // undefined until the first addition
  bool last = false;  // the next addition hands the sum to autograd
  bool open = true;

  explicit GradientSlot(const at::Tensor& parameter);

  // Adds the gradient of the leading slice, which the caller does not use afterwards. What the op returns to autograd for the
  // parameter: undefined before the last pass.
  at::Tensor add(at::Tensor part);
  at::Tensor take();
  // Later additions only give the gradient of full size.
  void close();
};

}  // namespace slimkernels
