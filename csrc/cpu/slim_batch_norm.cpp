#include "common.h"
#include "reference_call.h"
#include "row_norm.h"
#include "slim_batch_norm.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <tuple>

#define SK_INL "slim_batch_norm-inl.h"
#include "foreach_isa.h"

namespace slimkernels {
namespace {

void check_vector(const char* name, const OptionalTensor& t, int64_t channels) {
  TORCH_CHECK_VALUE(!t || (t->dim() == 1 && t->size(0) >= channels), "slim_batch_norm: expected ", name,
                    " of shape (C,) with C >= x.shape[1]=", channels, ", got ", t ? t->sizes() : at::IntArrayRef());
}

void check_like(const char* name, const at::Tensor& t, const at::Tensor& x) {
  TORCH_CHECK_VALUE(t.sizes() == x.sizes(), "slim_batch_norm: expected ", name, " of shape ", x.sizes(), ", got ", t.sizes());
  TORCH_CHECK_TYPE(t.scalar_type() == x.scalar_type(), "slim_batch_norm: expected ", name, " of dtype ", x.scalar_type(),
                   " like x, got ", t.scalar_type());
}

bool takes(const at::Tensor& x, const OptionalTensor& a, const OptionalTensor& b) {
  const auto fits = [](const OptionalTensor& t) { return !t || is_kernel_dtype(*t); };
  return is_kernel_dtype(x) && x.dim() >= 2 && x.numel() > 0 && fits(a) && fits(b);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> slim_batch_norm_cpu(
    const at::Tensor& x, const OptionalTensor& running_mean, const OptionalTensor& running_var, const OptionalTensor& weight,
    const OptionalTensor& bias, bool training, double eps, c10::string_view name, const OptionalTensor& residual) {
  if (!takes(x, weight, bias) || (!training && !takes(x, running_mean, running_var))) {
    return call_reference<decltype(slim_batch_norm_cpu)>("slimkernels::slim_batch_norm", x, running_mean, running_var, weight,
                                                         bias, training, eps, name, residual);
  }
  const int64_t channels = x.size(1);
  check_vector("weight", weight, channels);
  check_vector("bias", bias, channels);
  at::Tensor mean = at::empty({channels}, x.options().dtype(at::kFloat)), var = at::empty_like(mean);
  if (!training) {
    TORCH_CHECK_VALUE(running_mean && running_var,
                      "slim_batch_norm: expected running_mean and running_var when training is False, got None");
    check_vector("running_mean", running_mean, channels);
    check_vector("running_var", running_var, channels);
    mean.copy_(running_mean->narrow(0, 0, channels));
    var.copy_(running_var->narrow(0, 0, channels));
  }
  if (residual) check_like("residual", *residual, x);
  at::Tensor y = at::empty_like(x), out = y;
  auto layout = layout_of(y);
  if (!layout) {  // neither contiguous nor channels-last: computed contiguous, then copied
    out = at::empty(x.sizes(), x.options());
    layout = layout_of(out);
  }
  const NormOperand in(*layout, x), to(*layout, out), add(*layout, residual ? *residual : x);
  const std::vector<float> scale = first_entries(weight, channels, 1.0f), shift = first_entries(bias, channels, 0.0f);
  const Activation activation = parse_activation("slim_batch_norm", name);
  AT_DISPATCH_SWITCH(x.scalar_type(), "slim_batch_norm", SK_CASES_F32_BF16_F16([&] {
    ForwardCall<scalar_t> call;
    call.layout = *layout;
    call.x = {in.tensor.const_data_ptr<scalar_t>(), in.strides.outer, in.strides.inner};
    if (residual) call.residual = {add.tensor.const_data_ptr<scalar_t>(), add.strides.outer, add.strides.inner};
    call.y = {out.data_ptr<scalar_t>(), to.strides.outer, to.strides.inner};
    call.weight = scale.data();
    call.bias = shift.data();
    call.mean = mean.data_ptr<float>();
    call.var = var.data_ptr<float>();
    call.training = training;
    call.eps = eps;
    call.activation = activation;
    SK_CALL_ISA(slim_batch_norm_kernel, call);
  }));
  if (!out.is_same(y)) y.copy_(out);
  return {y, mean, var};
}

template <bool kFull>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> slim_batch_norm_backward_cpu(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& mean, const at::Tensor& var, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& output, const OptionalTensor& residual, bool training, double eps,
    c10::string_view name, bool need_dx, bool need_dw, bool need_db, bool need_dresidual) {
  if (!takes(x, weight, bias) || dy.scalar_type() != x.scalar_type() || mean.scalar_type() != at::kFloat ||
      var.scalar_type() != at::kFloat) {
    return call_reference<decltype(slim_batch_norm_backward_cpu<kFull>), kFull>(
        kFull ? "slimkernels::slim_batch_norm_backward" : "slimkernels::slim_batch_norm_backward_slice", dy, x, mean, var, weight, bias, output, residual, training, eps, name, need_dx,
        need_dw, need_db, need_dresidual);
  }
  const int64_t channels = x.size(1);
  check_vector("weight", weight, channels);
  check_vector("bias", bias, channels);
  check_vector("mean", mean, channels);
  check_vector("var", var, channels);
  check_like("dy", dy, x);
  const Activation activation = parse_activation("slim_batch_norm_backward", name);
  const OptionalTensor& saved = derivative_uses_output(activation) ? output : residual;
  if (saved) check_like(derivative_uses_output(activation) ? "output" : "residual", *saved, x);
  const auto wanted = [&](bool need) { return need ? at::empty_like(x) : at::empty({0}, dy.options()); };
  at::Tensor dx = wanted(need_dx), dz = wanted(need_dresidual), dx_out = dx, dz_out = dz;
  auto layout = layout_of(at::empty_like(x, x.options().device(at::kMeta)));
  if (!layout) {
    const at::Tensor contiguous = at::empty(x.sizes(), x.options());
    layout = layout_of(contiguous);
    if (need_dx) dx_out = contiguous;
    if (need_dresidual) dz_out = at::empty(x.sizes(), x.options());
  }
  const NormOperand in(*layout, x), grad(*layout, dy), kept(*layout, saved ? *saved : x);
  const std::vector<float> scale = first_entries(weight, channels, 1.0f), shift = first_entries(bias, channels, 0.0f),
                           means = first_entries(mean, channels, 0.0f), vars = first_entries(var, channels, 1.0f);
  std::vector<float> dw(channels), db(channels);
  AT_DISPATCH_SWITCH(x.scalar_type(), "slim_batch_norm_backward", SK_CASES_F32_BF16_F16([&] {
    BackwardCall<scalar_t> call;
    call.layout = *layout;
    call.dy = {grad.tensor.const_data_ptr<scalar_t>(), grad.strides.outer, grad.strides.inner};
    call.x = {in.tensor.const_data_ptr<scalar_t>(), in.strides.outer, in.strides.inner};
    if (saved) call.saved = {kept.tensor.const_data_ptr<scalar_t>(), kept.strides.outer, kept.strides.inner};
    const NormStrides dense = *strides_in(*layout, need_dx ? dx_out : need_dresidual ? dz_out : in.tensor);
    if (need_dx) call.dx = {dx_out.data_ptr<scalar_t>(), dense.outer, dense.inner};
    if (need_dresidual) call.dz = {dz_out.data_ptr<scalar_t>(), dense.outer, dense.inner};
    call.weight = scale.data();
    call.bias = shift.data();
    call.mean = means.data();
    call.var = vars.data();
    call.dw = dw.data();
    call.db = db.data();
    call.training = training;
    call.need_sums = need_dw || need_db || (need_dx && training);
    call.eps = eps;
    call.activation = activation;
    SK_CALL_ISA(slim_batch_norm_backward_kernel, call);
  }));
  if (!dx_out.is_same(dx)) dx.copy_(dx_out);
  if (!dz_out.is_same(dz)) dz.copy_(dz_out);
  const auto sized = [&](bool need, const OptionalTensor& like, const std::vector<float>& active) {
    if (!need || !like) return at::empty({0}, dy.options());
    return full_gradient(kFull ? *like : like->narrow(0, 0, channels), active);
  };
  return {dx, sized(need_dw, weight, dw), sized(need_db, bias, db), dz};
}

TORCH_LIBRARY_IMPL(slimkernels, CPU, m) {
  m.impl("slim_batch_norm", &slim_batch_norm_cpu);
  m.impl("slim_batch_norm_backward", &slim_batch_norm_backward_cpu<true>);
  m.impl("slim_batch_norm_backward_slice", &slim_batch_norm_backward_cpu<false>);
}

}  // namespace slimkernels
