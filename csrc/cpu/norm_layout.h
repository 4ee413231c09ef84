// How the norm kernels see a tensor (N, C, *): as planes (each channel of each sample contiguous) or as rows of channels.
#pragma once

#include "common.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/movedim.h>

#include <optional>
#include <vector>

namespace slimkernels {

// Planes: element (n, c, l) at n * outer + c * inner + l. Rows: element (row, c) at row * outer + c, the row being (n, l).
struct NormLayout {
  bool rows;
  int64_t samples, channels, length;  // length: product of the dimensions after the second
};

struct NormStrides {
  int64_t outer = 0, inner = 0;
};

// The stride at which dimensions `first` to the last can be walked as one, innermost stride `unit`; nullopt when they can't.
inline std::optional<int64_t> collapse(const at::Tensor& t, int64_t first, std::optional<int64_t> unit) {
  std::optional<int64_t> innermost = unit, next = unit;
  for (int64_t dim = t.dim() - 1; dim >= first; --dim) {
    if (dim == 1 || t.size(dim) == 1) continue;
    if (!next) innermost = next = t.stride(dim);
    if (t.stride(dim) != *next) return std::nullopt;
    *next *= t.size(dim);
  }
  return innermost ? innermost : t.size(1);
}

// How `t` can be read in this layout without a copy; nullopt when it can't.
inline std::optional<NormStrides> strides_in(const NormLayout& layout, const at::Tensor& t) {
  if (layout.rows) {
    if (t.stride(1) != 1 && t.size(1) != 1) return std::nullopt;
    const auto row = collapse(t, 0, std::nullopt);
    if (!row) return std::nullopt;
    return NormStrides{*row, 1};
  }
  if (layout.length > 1 && !collapse(t, 2, 1)) return std::nullopt;
  return NormStrides{t.stride(0), t.stride(1)};
}

// The layout that a dense output has; nullopt when it is neither.
inline std::optional<NormLayout> layout_of(const at::Tensor& y) {
  const int64_t length = y.numel() / (y.size(0) * y.size(1));
  for (const bool rows : {y.size(1) > 1 || length == 1, y.size(1) == 1 && length > 1}) {
    const NormLayout layout{rows, y.size(0), y.size(1), length};
    if (strides_in(layout, y)) return layout;
  }
  return std::nullopt;
}

// A tensor ready to be read in a layout: itself, or a copy when its strides don't fit.
struct NormOperand {
  at::Tensor tensor;
  NormStrides strides;

  NormOperand(const NormLayout& layout, const at::Tensor& t) : tensor(t) {
    auto found = strides_in(layout, t);
    if (!found) {
      tensor = layout.rows ? at::movedim(at::movedim(t, 1, -1).contiguous(), -1, 1) : t.contiguous();
      found = strides_in(layout, tensor);
    }
    strides = *found;
  }
};

// The first `count` entries of a vector as floats; `fill` where there is none.
inline std::vector<float> first_entries(const std::optional<at::Tensor>& t, int64_t count, float fill) {
  std::vector<float> values(count, fill);
  if (!t) return values;
  const at::Tensor active = t->narrow(0, 0, count).to(at::kFloat);
  const float* p = active.const_data_ptr<float>();
  for (int64_t i = 0; i < count; ++i) values[i] = p[i * active.stride(0)];
  return values;
}

inline bool is_kernel_dtype(const at::Tensor& t) {
  return t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16 || t.scalar_type() == at::kHalf;
}

}  // namespace slimkernels
