#include "row_norm.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>

#define SK_INL "row_norm-inl.h"
#include "foreach_isa.h"

namespace slimkernels {
namespace {

void check_vector(std::string_view op, const char* name, const OptionalTensor& t, int64_t columns) {
  TORCH_CHECK_VALUE(!t || (t->dim() == 1 && t->size(0) >= columns), op, ": expected ", name,
                    " of shape (C,) with C >= x.shape[-1]=", columns, ", got ", t ? t->sizes() : at::IntArrayRef());
}

void check_like(std::string_view op, const char* name, const at::Tensor& t, const at::Tensor& x) {
  TORCH_CHECK_VALUE(t.sizes() == x.sizes(), op, ": expected ", name, " of shape ", x.sizes(), ", got ", t.sizes());
  TORCH_CHECK_TYPE(t.scalar_type() == x.scalar_type(), op, ": expected ", name, " of dtype ", x.scalar_type(), " like x, got ",
                   t.scalar_type());
}

// The widest vector has 16 floats.
std::vector<float> padded_entries(const OptionalTensor& t, int64_t count, float fill) {
  std::vector<float> values = first_entries(t, count, fill);
  values.resize(count + 16, 0.0f);
  return values;
}

}  // namespace

at::Tensor full_gradient(const at::Tensor& like, const std::vector<float>& active) {
  at::Tensor grad = at::zeros_like(like, like.options(), at::MemoryFormat::Contiguous);
  AT_DISPATCH_SWITCH(grad.scalar_type(), "full_gradient", SK_CASES_F32_BF16_F16([&] {
    std::copy(active.begin(), active.end(), grad.data_ptr<scalar_t>());
  }));
  return grad;
}

bool row_norm_takes(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias) {
  return is_kernel_dtype(x) && x.dim() >= 1 && x.numel() > 0 && (!weight || is_kernel_dtype(*weight)) &&
         (!bias || is_kernel_dtype(*bias));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> row_norm(std::string_view op, const at::Tensor& x, const OptionalTensor& weight,
                                                        const OptionalTensor& bias, bool with_mean, double eps,
                                                        std::string_view activation, const OptionalTensor& residual) {
  const int64_t columns = x.size(-1);
  check_vector(op, "weight", weight, columns);
  check_vector(op, "bias", bias, columns);
  if (residual) check_like(op, "residual", *residual, x);
  const at::Tensor in = x.contiguous(), add = residual ? residual->contiguous() : in;
  at::Tensor y = at::empty(x.sizes(), x.options());
  at::Tensor invstd = at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(at::kFloat)), mean;
  if (with_mean) mean = at::empty_like(invstd);
  const std::vector<float> scale = padded_entries(weight, columns, 1.0f), shift = padded_entries(bias, columns, 0.0f);
  AT_DISPATCH_SWITCH(x.scalar_type(), "row_norm", SK_CASES_F32_BF16_F16([&] {
    RowNormCall<scalar_t> call;
    call.rows = x.numel() / columns;
    call.columns = columns;
    call.x = in.const_data_ptr<scalar_t>();
    call.residual = residual ? add.const_data_ptr<scalar_t>() : nullptr;
    call.y = y.data_ptr<scalar_t>();
    call.weight = scale.data();
    call.bias = shift.data();
    call.mean = with_mean ? mean.data_ptr<float>() : nullptr;
    call.invstd = invstd.data_ptr<float>();
    call.eps = eps;
    call.activation = parse_activation(op, activation);
    SK_CALL_ISA(row_norm_kernel, call);
  }));
  return {y, mean, invstd};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> row_norm_backward(
    std::string_view op, const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& mean, const at::Tensor& invstd,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& output, const OptionalTensor& residual,
    std::string_view activation, bool need_dx, bool need_dw, bool need_db, bool need_dresidual) {
  const int64_t columns = x.size(-1), rows = x.numel() / columns;
  check_vector(op, "weight", weight, columns);
  check_vector(op, "bias", bias, columns);
  check_like(op, "dy", dy, x);
  TORCH_CHECK_VALUE(invstd.numel() == rows && (!mean || mean->numel() == rows), op, ": expected ", rows, " statistics, got ",
                    invstd.sizes());
  const Activation parsed = parse_activation(op, activation);
  const OptionalTensor& saved = derivative_uses_output(parsed) ? output : residual;
  if (saved) check_like(op, derivative_uses_output(parsed) ? "output" : "residual", *saved, x);
  const at::Tensor in = x.contiguous(), grad = dy.contiguous(), kept = saved ? saved->contiguous() : in;
  const at::Tensor stds = invstd.contiguous(), means = mean ? mean->contiguous() : stds;
  const auto wanted = [&](bool need) { return need ? at::empty(x.sizes(), x.options()) : at::empty({0}, dy.options()); };
  at::Tensor dx = wanted(need_dx), dz = wanted(need_dresidual);
  const std::vector<float> scale = padded_entries(weight, columns, 1.0f), shift = padded_entries(bias, columns, 0.0f);
  std::vector<float> dw(columns), db(columns);
  AT_DISPATCH_SWITCH(x.scalar_type(), "row_norm_backward", SK_CASES_F32_BF16_F16([&] {
    RowNormBackwardCall<scalar_t> call;
    call.rows = rows;
    call.columns = columns;
    call.dy = grad.const_data_ptr<scalar_t>();
    call.x = in.const_data_ptr<scalar_t>();
    call.saved = saved ? kept.const_data_ptr<scalar_t>() : nullptr;
    call.dx = need_dx ? dx.data_ptr<scalar_t>() : nullptr;
    call.dz = need_dresidual ? dz.data_ptr<scalar_t>() : nullptr;
    call.weight = scale.data();
    call.bias = shift.data();
    call.mean = mean ? means.const_data_ptr<float>() : nullptr;
    call.invstd = stds.const_data_ptr<float>();
    call.dw = dw.data();
    call.db = db.data();
    call.activation = parsed;
    SK_CALL_ISA(row_norm_backward_kernel, call);
  }));
  return {dx, need_dw && weight ? full_gradient(*weight, dw) : at::empty({0}, dy.options()),
          need_db && bias ? full_gradient(*bias, db) : at::empty({0}, dy.options()), dz};
}

}  // namespace slimkernels
