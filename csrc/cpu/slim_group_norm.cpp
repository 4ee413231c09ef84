#include "slim_group_norm.h"

#include "reference_call.h"
#include "row_norm.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>

#define SK_INL "slim_group_norm-inl.h"
#include "foreach_isa.h"

namespace slimkernels {
namespace {

bool takes(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, int64_t group_size) {
  return x.dim() >= 2 && row_norm_takes(x, weight, bias) && group_size > 0;
}

void check_vector(const char* name, const OptionalTensor& t, int64_t channels) {
  TORCH_CHECK_VALUE(!t || (t->dim() == 1 && t->size(0) >= channels), "slim_group_norm: expected ", name,
                    " of shape (C,) with C >= x.shape[1]=", channels, ", got ", t ? t->sizes() : at::IntArrayRef());
}

void check_like(const char* name, const at::Tensor& t, const at::Tensor& x) {
  TORCH_CHECK_VALUE(t.sizes() == x.sizes(), "slim_group_norm: expected ", name, " of shape ", x.sizes(), ", got ", t.sizes());
  TORCH_CHECK_TYPE(t.scalar_type() == x.scalar_type(), "slim_group_norm: expected ", name, " of dtype ", x.scalar_type(),
                   " like x, got ", t.scalar_type());
}

// The kernels walk contiguous memory; a result of another layout (channels-last) is copied into it.
at::Tensor in_layout_of(const at::Tensor& x, const at::Tensor& contiguous) {
  at::Tensor out = at::empty_like(x);
  return out.is_contiguous() ? contiguous : out.copy_(contiguous);
}

template <typename Call>
void set_shape(Call& call, const at::Tensor& x, int64_t group_size, const float* weight, const float* bias) {
  call.samples = x.size(0);
  call.channels = x.size(1);
  call.length = x.numel() / (x.size(0) * x.size(1));
  call.group_size = group_size;
  call.weight = weight;
  call.bias = bias;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> slim_group_norm_cpu(const at::Tensor& x, const OptionalTensor& weight,
                                                                   const OptionalTensor& bias, int64_t group_size, double eps,
                                                                   c10::string_view activation, const OptionalTensor& residual) {
  if (!takes(x, weight, bias, group_size)) {
    return call_reference<decltype(slim_group_norm_cpu)>("slimkernels::slim_group_norm", x, weight, bias, group_size, eps,
                                                         activation, residual);
  }
  const int64_t channels = x.size(1);
  check_vector("weight", weight, channels);
  check_vector("bias", bias, channels);
  if (residual) check_like("residual", *residual, x);
  const at::Tensor in = x.contiguous(), add = residual ? residual->contiguous() : in, y = at::empty(x.sizes(), x.options());
  const at::Tensor mean = at::empty({x.size(0), (channels + group_size - 1) / group_size}, x.options().dtype(at::kFloat));
  const at::Tensor invstd = at::empty_like(mean);
  const std::vector<float> scale = first_entries(weight, channels, 1.0f), shift = first_entries(bias, channels, 0.0f);
  AT_DISPATCH_SWITCH(x.scalar_type(), "slim_group_norm", SK_CASES_F32_BF16_F16([&] {
    GroupNormCall<scalar_t> call;
    set_shape(call, x, group_size, scale.data(), shift.data());
    call.x = in.const_data_ptr<scalar_t>();
    call.residual = residual ? add.const_data_ptr<scalar_t>() : nullptr;
    call.y = y.data_ptr<scalar_t>();
    call.mean = mean.data_ptr<float>();
    call.invstd = invstd.data_ptr<float>();
    call.eps = eps;
    call.activation = parse_activation("slim_group_norm", activation);
    SK_CALL_ISA(slim_group_norm_kernel, call);
  }));
  return {in_layout_of(x, y), mean, invstd};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> slim_group_norm_backward_cpu(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& mean, const at::Tensor& invstd, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& output, const OptionalTensor& residual, int64_t group_size,
    c10::string_view activation, bool need_dx, bool need_dw, bool need_db, bool need_dresidual) {
  if (!takes(x, weight, bias, group_size) || mean.scalar_type() != at::kFloat || invstd.scalar_type() != at::kFloat) {
    return call_reference<decltype(slim_group_norm_backward_cpu)>("slimkernels::slim_group_norm_backward", dy, x, mean, invstd,
                                                                  weight, bias, output, residual, group_size, activation, need_dx,
                                                                  need_dw, need_db, need_dresidual);
  }
  const int64_t samples = x.size(0), channels = x.size(1), statistics = samples * ((channels + group_size - 1) / group_size);
  check_vector("weight", weight, channels);
  check_vector("bias", bias, channels);
  check_like("dy", dy, x);
  TORCH_CHECK_VALUE(mean.numel() == statistics && invstd.numel() == statistics, "slim_group_norm_backward: expected ", statistics,
                    " statistics, got ", mean.sizes(), " and ", invstd.sizes());
  const Activation parsed = parse_activation("slim_group_norm_backward", activation);
  const OptionalTensor& saved = derivative_uses_output(parsed) ? output : residual;
  if (saved) check_like(derivative_uses_output(parsed) ? "output" : "residual", *saved, x);
  const at::Tensor in = x.contiguous(), grad = dy.contiguous(), kept = saved ? saved->contiguous() : in;
  const at::Tensor means = mean.contiguous(), stds = invstd.contiguous();
  const auto wanted = [&](bool need) { return need ? at::empty(x.sizes(), x.options()) : at::empty({0}, dy.options()); };
  const at::Tensor dx = wanted(need_dx), dz = wanted(need_dresidual);
  const std::vector<float> scale = first_entries(weight, channels, 1.0f), shift = first_entries(bias, channels, 0.0f);
  std::vector<double> dw(samples * channels), db(samples * channels);
  AT_DISPATCH_SWITCH(x.scalar_type(), "slim_group_norm_backward", SK_CASES_F32_BF16_F16([&] {
    GroupNormBackwardCall<scalar_t> call;
    set_shape(call, x, group_size, scale.data(), shift.data());
    call.dy = grad.const_data_ptr<scalar_t>();
    call.x = in.const_data_ptr<scalar_t>();
    call.saved = saved ? kept.const_data_ptr<scalar_t>() : nullptr;
    call.dx = need_dx ? dx.data_ptr<scalar_t>() : nullptr;
    call.dz = need_dresidual ? dz.data_ptr<scalar_t>() : nullptr;
    call.mean = means.const_data_ptr<float>();
    call.invstd = stds.const_data_ptr<float>();
    call.dw = dw.data();
    call.db = db.data();
    call.activation = parsed;
    SK_CALL_ISA(slim_group_norm_backward_kernel, call);
  }));
  const auto gradient_of = [&](const OptionalTensor& t, bool need, const std::vector<double>& parts) {
    if (!need || !t) return at::empty({0}, dy.options());
    std::vector<float> totals(channels);
    for (int64_t c = 0; c < channels; ++c) {
      double total = 0;
      for (int64_t n = 0; n < samples; ++n) total += parts[n * channels + c];
      totals[c] = static_cast<float>(total);
    }
    return full_gradient(*t, totals);
  };
  return {need_dx ? in_layout_of(x, dx) : dx, gradient_of(weight, need_dw, dw), gradient_of(bias, need_db, db),
          need_dresidual ? in_layout_of(x, dz) : dz};
}

}  // namespace

TORCH_LIBRARY_IMPL(slimkernels, CPU, m) {
  m.impl("slim_group_norm", &slim_group_norm_cpu);
  m.impl("slim_group_norm_backward", &slim_group_norm_backward_cpu);
}

}  // namespace slimkernels
