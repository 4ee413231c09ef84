#include "gradient_slot.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros_like.h>

#include <utility>

#include "common.h"

namespace slimkernels {
namespace {

void add_to_slice(const at::Tensor& target, const at::Tensor& part) {
  bool fits = part.dim() == target.dim();
  for (int64_t d = 0; fits && d < part.dim(); ++d) fits = part.size(d) <= target.size(d);
  TORCH_CHECK_VALUE(fits, "gradient_slots: expected a gradient of at most the shape ", target.sizes(), ", got ", part.sizes());
  target.as_strided(part.sizes(), target.strides()).add_(part);
}

at::Tensor extended(const at::Tensor& part, const at::Tensor& like) {
  at::Tensor zeros = at::zeros_like(like);
  add_to_slice(zeros, part);
  return zeros;
}

}  // namespace

GradientSlot::GradientSlot(const at::Tensor& given) : parameter(given), leaf(given.detach()) { leaf.requires_grad_(true); }

at::Tensor GradientSlot::add(at::Tensor part) {
  const at::NoGradGuard no_grad;
  part = part.to(parameter.scalar_type());
  if (!open) return extended(part, parameter);
  if (total.defined()) {
    add_to_slice(total, part);
  } else if (part.sizes() == parameter.sizes() && part.strides() == parameter.strides()) {
    total = std::move(part);
  } else {
    total = extended(part, parameter);
  }
  return last ? take() : at::Tensor();
}

at::Tensor GradientSlot::take() { return std::exchange(total, at::Tensor()); }

void GradientSlot::close() {
  open = false;
  total.reset();
}

}  // namespace slimkernels
