#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "common.h"
#include "gemm.h"
#include "reference_call.h"

namespace slimkernels {
namespace {

constexpr int64_t kGradientRows = 256;  // of the block of dw that a task holds in cache
constexpr int64_t kGradientCols = 256;

// What happens to a float tile on its way to memory: act(tile + bias + residual), rounded to T.
template <typename T>
struct Finish {
  T* out;
  int64_t ld_out;
  const float* bias;  // by packed column, or null
  const T* residual;  // or null
  int64_t ld_residual;
  Activation activation;
};

}  // namespace
}  // namespace slimkernels

#define SK_INL "slim_linear-inl.h"
#include "foreach_isa.h"

namespace slimkernels {
namespace {

struct Sizes {
  int64_t m, n, k;
};

void check_blocks(const char* name, int64_t active, int64_t full, const char* blocks_name, int64_t blocks) {
  TORCH_CHECK_VALUE(blocks >= 1 && full % blocks == 0, "slim_linear: expected ", blocks_name,
                    " to divide the full size ", full, ", got ", blocks);
  TORCH_CHECK_VALUE(active >= 1 && active <= full, "slim_linear: expected ", name, " between 1 and ", full, ", got ",
                    active);
  TORCH_CHECK_VALUE(active % blocks == 0, "slim_linear: expected ", name, " to be a multiple of ", blocks_name, "=",
                    blocks, ", got ", active);
}

Sizes check(const at::Tensor& x, const at::Tensor& weight, int64_t n, int64_t in_blocks, int64_t out_blocks) {
  TORCH_CHECK_VALUE(weight.dim() == 2, "slim_linear: expected weight to have 2 dimensions (N, K), got shape ",
                    weight.sizes());
  TORCH_CHECK_VALUE(x.dim() >= 1, "slim_linear: expected x to have at least 1 dimension, got shape ", x.sizes());
  const int64_t k = x.size(-1);
  check_blocks("out_features", n, weight.size(0), "out_blocks", out_blocks);
  check_blocks("x.shape[-1]", k, weight.size(1), "in_blocks", in_blocks);
  return {x.numel() / k, n, k};
}

bool takes(const at::Tensor& x, const at::Tensor& weight) {
  const auto dtype = x.scalar_type();
  // Without AVX-512, F.linear is the better kernel: oneDNN's AVX2 brgemm gave 40 to 70 GFLOP/s where MKL gave 80 to 95.
  return current_isa() == Isa::kAvx512 && (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf) &&
         weight.scalar_type() == dtype && x.numel() > 0 && x.device().is_cpu() && weight.device().is_cpu();
}

// Strides of a 2-D tensor one of which is 1 and the other no smaller than the row; anything else gives false.
template <typename T>
bool as_matrix(const at::Tensor& t, Matrix<T>& out) {
  const int64_t rows = t.size(0), cols = t.size(1);
  out = {t.const_data_ptr<T>(), t.stride(0), t.stride(1)};
  if (cols == 1) out.col = out.row > 1 || rows == 1 ? 1 : std::max<int64_t>(rows, 1);
  if (rows == 1) out.row = out.col == 1 ? cols : 1;
  return (out.col == 1 && out.row >= cols) || (out.row == 1 && out.col >= rows);
}

// Rows of the last dimension, each contiguous; a copy only where the tensor does not have them.
at::Tensor as_rows(const at::Tensor& t, int64_t rows, int64_t cols) {
  const at::Tensor two = t.reshape({rows, cols});
  const bool fine = (cols == 1 || two.stride(1) == 1) && (rows == 1 || two.stride(0) >= cols);
  return fine ? two : two.contiguous();
}

template <typename T>
Matrix<T> row_matrix(const at::Tensor& two) {
  return {two.const_data_ptr<T>(), two.size(0) == 1 ? two.size(1) : two.stride(0), 1};
}

// One part a block: the summed dimension never crosses a block.
std::vector<Depth> depths(const std::vector<Range>& parts) {
  std::vector<Depth> out;
  for (const Range& part : parts) out.push_back({part.packed, part.full, part.size});
  return out;
}

// bfloat16 is multiplied as it is where the CPU can; float16 never (brgemm falls to 31 GFLOP/s where float32 has 235).
template <typename T, typename Call>
void with_multiplied_type(Call call) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    if (gemm_takes_bf16()) return call(c10::BFloat16());
  }
  call(float());
}

at::Tensor slim_linear_cpu(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                           int64_t out_features, int64_t in_blocks, int64_t out_blocks, c10::string_view activation_name,
                           const std::optional<at::Tensor>& residual) {
  const Activation activation = parse_activation("slim_linear", activation_name);
  const auto [m, n, k] = check(x, weight, out_features, in_blocks, out_blocks);
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = n;
  for (const auto* other : {&bias, &residual}) {
    TORCH_CHECK_TYPE(!other->has_value() || (*other)->scalar_type() == x.scalar_type(), "slim_linear: expected ",
                     other == &bias ? "bias" : "residual", " of dtype ", x.scalar_type(), " like x, got ",
                     (*other)->scalar_type());
  }
  TORCH_CHECK_VALUE(!bias || bias->sizes() == at::IntArrayRef{weight.size(0)}, "slim_linear: expected bias of shape (",
                    weight.size(0), ",), got ", bias->sizes());
  TORCH_CHECK_VALUE(!residual || residual->sizes() == at::IntArrayRef(shape), "slim_linear: expected residual of shape ",
                    at::IntArrayRef(shape), ", got ", residual->sizes());
  const auto reference = [&] {
    return call_reference<decltype(slim_linear_cpu)>("slimkernels::slim_linear", x, weight, bias, out_features,
                                                     in_blocks, out_blocks, activation_name, residual);
  };
  if (!takes(x, weight)) return reference();

  at::Tensor y = at::empty(shape, x.options());
  const auto run = [&]<typename T>(T) {
    Matrix<T> w;
    if (!as_matrix(weight, w)) return false;
    const at::Tensor x2 = as_rows(x, m, k);
    const at::Tensor r2 = residual ? as_rows(*residual, m, n) : at::Tensor();
    const Matrix<T> xm = row_matrix<T>(x2);
    const std::vector<Range> cols = ranges(out_blocks, weight.size(0) / out_blocks, n / out_blocks, kTileCols);
    const std::vector<Depth> depth = depths(ranges(in_blocks, weight.size(1) / in_blocks, k / in_blocks, k));
    float* bias_values = nullptr;
    if (bias) {
      bias_values = static_cast<float*>(scratch(kScratchBias, n * sizeof(float)));
      const T* values = bias->const_data_ptr<T>();
      for (const Range& col : cols) {
        for (int64_t j = 0; j < col.size; ++j) {
          bias_values[col.packed + j] = static_cast<float>(values[(col.full + j) * bias->stride(0)]);
        }
      }
    }
    const Finish<T> finish{y.data_ptr<T>(), n, bias_values, residual ? r2.const_data_ptr<T>() : nullptr,
                           residual ? row_matrix<T>(r2).row : 0, activation};
    if (m <= 4 && w.col == 1) {
      if (m == 1) SK_CALL_ISA(few_rows_kernel<1>, xm, w, cols, depth, finish);
      if (m == 2) SK_CALL_ISA(few_rows_kernel<2>, xm, w, cols, depth, finish);
      if (m == 3) SK_CALL_ISA(few_rows_kernel<3>, xm, w, cols, depth, finish);
      if (m == 4) SK_CALL_ISA(few_rows_kernel<4>, xm, w, cols, depth, finish);
      return true;
    }
    const bool turned = w.col == 1 && m <= 4 * kTileRows && 2 * m <= n;
    with_multiplied_type<T>(
        [&]<typename C>(C) { SK_CALL_ISA(linear_kernel<C>, xm, m, w, cols, depth, turned, finish); });
    return true;
  };
  bool done = false;
  AT_DISPATCH_SWITCH(x.scalar_type(), "slim_linear", SK_CASES_F32_BF16_F16([&] { done = run(scalar_t()); }));
  return done ? y : reference();
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> slim_linear_backward_cpu(const at::Tensor& dy, const at::Tensor& x,
                                                                        const at::Tensor& weight, int64_t in_blocks,
                                                                        int64_t out_blocks, bool need_dx, bool need_dw,
                                                                        bool need_db) {
  TORCH_CHECK_VALUE(dy.dim() >= 1, "slim_linear: expected dy to have at least 1 dimension, got shape ", dy.sizes());
  const auto [m, n, k] = check(x, weight, dy.size(-1), in_blocks, out_blocks);
  TORCH_CHECK_VALUE(dy.numel() == m * n, "slim_linear: expected dy of ", m, " rows like x, got shape ", dy.sizes());
  const auto reference = [&] {
    return call_reference<decltype(slim_linear_backward_cpu)>("slimkernels::slim_linear_backward", dy, x, weight,
                                                              in_blocks, out_blocks, need_dx, need_dw, need_db);
  };
  if (!takes(x, weight) || dy.scalar_type() != x.scalar_type()) return reference();

  at::Tensor dx = need_dx ? at::empty(x.sizes(), x.options()) : at::empty({0}, x.options());
  // Zeros only where something outside the slice stays zero: at full width every element is written.
  const bool all_rows = n == weight.size(0), all = all_rows && k == weight.size(1);
  const auto gradient = [&](bool needed, bool whole, at::IntArrayRef shape) {
    return !needed ? at::empty({0}, x.options()) : whole ? at::empty(shape, x.options()) : at::zeros(shape, x.options());
  };
  at::Tensor dw = gradient(need_dw, all, weight.sizes());
  at::Tensor db = gradient(need_db, all_rows, weight.size(0));
  const auto run = [&]<typename T>(T) {
    Matrix<T> w;
    if (!as_matrix(weight, w)) return false;
    const at::Tensor dy2 = as_rows(dy, m, n), x2 = as_rows(x, m, k);
    const Matrix<T> dym = row_matrix<T>(dy2), xm = row_matrix<T>(x2);
    const int64_t out_part = weight.size(0) / out_blocks, in_part = weight.size(1) / in_blocks;
    with_multiplied_type<T>([&]<typename C>(C) {
      if (need_dx) {
        const Finish<T> finish{dx.data_ptr<T>(), k, nullptr, nullptr, 0, Activation::kNone};
        SK_CALL_ISA(input_gradient_kernel<C>, dym, m, w, ranges(in_blocks, in_part, k / in_blocks, kTileCols),
                    depths(ranges(out_blocks, out_part, n / out_blocks, n)), finish);
      }
      if (need_dw) {
        SK_CALL_ISA(weight_gradient_kernel<C>, dym, xm, m, ranges(out_blocks, out_part, n / out_blocks, kGradientRows),
                    ranges(in_blocks, in_part, k / in_blocks, kGradientCols), dw.data_ptr<T>(), weight.size(1),
                    need_db ? db.data_ptr<T>() : nullptr);
      }
    });
    if (need_db && !need_dw) {
      const at::Tensor sums = at::sum(dy2, {0});
      for (const Range& part : ranges(out_blocks, out_part, n / out_blocks, n)) {
        db.narrow(0, part.full, part.size).copy_(sums.narrow(0, part.packed, part.size));
      }
    }
    return true;
  };
  bool done = false;
  AT_DISPATCH_SWITCH(x.scalar_type(), "slim_linear_backward", SK_CASES_F32_BF16_F16([&] { done = run(scalar_t()); }));
  return done ? std::make_tuple(dx, dw, db) : reference();
}

}  // namespace

TORCH_LIBRARY_IMPL(slimkernels, CPU, m) {
  m.impl("slim_linear", &slim_linear_cpu);
  m.impl("slim_linear_backward", &slim_linear_backward_cpu);
}

}  // namespace slimkernels
