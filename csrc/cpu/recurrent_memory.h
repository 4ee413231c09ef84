// Memory of the recurrent layers: large pages, and what one training step gives back for the next.
#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>

namespace slimkernels {

// A fresh tensor of the shape (lead..., the dimensions of x but the last, tail...).
at::Tensor recurrent_empty(const at::Tensor& x, std::initializer_list<int64_t> lead,
                           std::initializer_list<int64_t> tail);

// The same for what lives from a forward pass to its backward pass, or shorter: in memory given back before, if some
// fits.
at::Tensor recurrent_kept(const at::Tensor& x, at::ScalarType dtype, std::initializer_list<int64_t> lead,
                          std::initializer_list<int64_t> tail);

// What was given back goes to PyTorch's allocator.
void release_spare_memory();

}  // namespace slimkernels
