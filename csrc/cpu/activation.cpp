#include "common.h"
#include "reference_call.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#define SK_INL "activation-inl.h"
#include "foreach_isa.h"

namespace slimkernels {
namespace {

bool takes(const at::Tensor& t) {
  return (t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16 || t.scalar_type() == at::kHalf) &&
         t.is_non_overlapping_and_dense();
}

// Elementwise over memory in order, so any dense layout will do and the result keeps it.
at::Tensor activation_cpu(const at::Tensor& x, c10::string_view name) {
  if (!takes(x)) return call_reference<decltype(activation_cpu)>("slimkernels::activation", x, name);
  const Activation activation = parse_activation("activation", name);
  at::Tensor y = at::empty_like(x);
  AT_DISPATCH_SWITCH(x.scalar_type(), "activation", SK_CASES_F32_BF16_F16([&] {
    SK_CALL_ISA(activation_kernel, x.const_data_ptr<scalar_t>(), y.data_ptr<scalar_t>(), x.numel(), activation);
  }));
  return y;
}

at::Tensor activation_backward_cpu(const at::Tensor& dy, const at::Tensor& saved, c10::string_view name) {
  if (!takes(dy) || dy.sizes() != saved.sizes() || dy.strides() != saved.strides() ||
      dy.scalar_type() != saved.scalar_type()) {
    return call_reference<decltype(activation_backward_cpu)>("slimkernels::activation_backward", dy, saved, name);
  }
  const Activation activation = parse_activation("activation", name);
  at::Tensor dx = at::empty_like(dy);
  AT_DISPATCH_SWITCH(dy.scalar_type(), "activation_backward", SK_CASES_F32_BF16_F16([&] {
    SK_CALL_ISA(activation_backward_kernel, dy.const_data_ptr<scalar_t>(), saved.const_data_ptr<scalar_t>(),
                dx.data_ptr<scalar_t>(), dy.numel(), activation);
  }));
  return dx;
}

}  // namespace

TORCH_LIBRARY_IMPL(slimkernels, CPU, m) {
  m.impl("activation", &activation_cpu);
  m.impl("activation_backward", &activation_backward_cpu);
}

}  // namespace slimkernels
